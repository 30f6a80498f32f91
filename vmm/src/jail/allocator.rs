//! The C library's allocator, made fit for the jail: one arena for all threads. By default every thread gets an arena of its own, for which the
//! library opens files (how many processors are there, may a heap shrink) at a time of its choosing, and which costs memory.

/// For threads that are started from now on.
pub fn one_arena() {
    // SAFETY: no pointers are passed, and the library takes its lock. It fails only for arguments that make no sense.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what was only needed to build the machine: a snapshot's state, the command line, filters.
pub fn trim() {
    // SAFETY: only memory that no allocation holds is given back.
    unsafe { libc::malloc_trim(0) };
}
