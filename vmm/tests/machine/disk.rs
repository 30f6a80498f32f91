//! The disk of whole machines: a real file system on it, what is deleted given back, the rate limit, a driver taken away while it is busy.
//! `mkfs.ext4` must be on the path.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use commonage_vmm_api::{BlockMetrics, RateLimit};

use super::control::{attach, hear};
use super::*;

const MIB: u64 = 1 << 20;

/// An image with an empty ext4 file system, sparse.
fn ext4(path: PathBuf, mib: u64) -> PathBuf {
    std::fs::File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    // No lazy initialisation: the guest's kernel would go on writing zeroes while blocks are counted.
    let options = ["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
    assert!(Command::new("mkfs.ext4").args(options).arg(&path).status().unwrap().success());
    path
}

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

fn disk_metrics(machine: &Machine, child: &mut Child) -> BlockMetrics {
    let client = machine.connect(child);
    ask(&client, &Request::Metrics);
    let Response::Metrics(metrics) = answer(&client) else { panic!("no metrics") };
    metrics.disk
}

/// Gives the guest `script` instead.
fn run_instead(machine: &Machine, script: &str) {
    std::fs::write(machine.path("initrd"), initrd(script, &[])).unwrap();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL, /bin/busybox and mkfs.ext4"]
fn a_file_system_keeps_what_was_synced_and_gives_back_what_was_deleted() {
    let mut machine = Machine::new(
        "mkdir /mnt; mount -t ext4 /dev/vda /mnt || echo NOT MOUNTED\n\
         dd if=/dev/urandom of=/mnt/file bs=64k count=256 2>/dev/null; sync\n\
         md5sum /mnt/file > /mnt/sum; sync; echo WRITTEN; sleep 1000",
    );
    let image = ext4(machine.path("image"), 64);
    let empty = allocated(&image);
    machine.config.disk = Some(disk(image.clone()));
    let root = rustix::process::geteuid().is_root();
    machine.config.jail = root.then_some(JailConfig { uid: UID });
    let mut child = machine.start();
    let mut console = attach(&machine, &mut child);
    hear(&mut console, &mut String::new(), "WRITTEN");
    assert!(allocated(&image) >= empty + 16 * MIB);
    assert!(disk_metrics(&machine, &mut child).written_bytes >= 16 * MIB);
    // The machine is killed, not stopped: what was synced is there all the same.
    child.kill().unwrap();
    child.wait().unwrap();

    run_instead(
        &machine,
        "mkdir /mnt; mount -t ext4 /dev/vda /mnt || echo NOT MOUNTED\n\
         md5sum -c /mnt/sum && echo SAME\nrm /mnt/file; sync; fstrim /mnt && echo TRIMMED; umount /mnt",
    );
    assert_eq!(machine.run().code(), Some(0), "{}", machine.console());
    let said = machine.console();
    assert!(said.contains("SAME") && said.contains("TRIMMED"), "{said}");
    let left = allocated(&image);
    assert!(left < empty + 4 * MIB, "{left} bytes are still allocated, {empty} were before");
    assert_eq!(image.metadata().unwrap().len(), 64 * MIB);
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_disk_is_as_slow_as_it_is_told_to_be() {
    const RATE: u64 = 4 * MIB;
    let mut machine = Machine::new(
        "echo READY; read line\ndd if=/dev/vda of=/dev/null bs=128k count=128 iflag=direct 2>/dev/null; echo DONE; sleep 1000",
    );
    machine.config.disk = Some(disk(file(&machine.path("disk"), &vec![7; 16 << 20])));
    let rate = RateLimit { bytes_per_second: RATE, requests_per_second: 0 };
    machine.config.disk.as_mut().unwrap().rate = Some(rate);
    let mut child = machine.start();
    let mut console = attach(&machine, &mut child);
    let mut heard = String::new();
    hear(&mut console, &mut heard, "READY");
    let begun = Instant::now();
    console.write_all(b"\n").unwrap();
    hear(&mut console, &mut heard, "DONE");
    let took = begun.elapsed();
    // A second's worth is free, and so is the last request.
    let least = Duration::from_secs_f64((16 * MIB - 128 * 1024) as f64 / RATE as f64 - 1.0);
    assert!(took >= least, "16 MiB were read in {took:?}, which takes {least:?} at least");
    let metrics = disk_metrics(&machine, &mut child);
    assert!(metrics.held_back > 0 && metrics.read_bytes >= 16 * MIB, "{metrics:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "needs KVM, SLIVER_KERNEL and /bin/busybox"]
fn a_driver_may_be_taken_away_while_the_disk_is_busy() {
    let mut machine = Machine::new(
        "mkdir /sys; mount -t sysfs none /sys; cd /sys/bus/virtio/drivers/virtio_blk\nname=$(ls -d virtio*)\n\
         for turn in 1 2 3; do\n\
         for job in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null & dd if=/dev/zero of=/dev/vda bs=64k seek=32 2>/dev/null & done\n\
         echo $name > unbind; wait; echo $name > bind; done\n\
         dd if=/dev/vda of=/dev/null bs=64k count=64 && echo STILL READS",
    );
    machine.config.disk = Some(disk(file(&machine.path("disk"), &[0; 8 << 20])));
    assert_eq!(machine.run().code(), Some(0), "{}", machine.console());
    assert!(machine.console().contains("STILL READS"), "{}", machine.console());
}
