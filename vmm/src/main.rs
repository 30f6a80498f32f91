//! `sliver-vmm`: one process, one sliver's virtual machine.

fn main() {}
