//! What the machine is made of, for PLC to record. What cannot be found out is left empty.

use std::{collections::BTreeMap, fs, path::Path};

use commonage_init::mounts::property;
use commonage_plc_api::boot::Facts;

/// Looks at `/proc` and `/sys`.
pub fn gather() -> Facts {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let uefi = Path::new("/sys/firmware/efi").exists();
    let (cpus, cpu_model, virtualisation) = processors(&cpuinfo);
    Facts {
        cpus,
        cpu_model,
        virtualisation,
        memory_mib: memory_mib(&meminfo),
        disks: crate::disk::names()
            .into_iter()
            .map(|name| (name.clone(), crate::disk::size(&name)))
            .collect(),
        interfaces: interfaces(Path::new("/sys/class/net")),
        firmware: if uefi { "uefi" } else { "bios" }.into(),
    }
}

/// Number, model and kind of virtualisation from `/proc/cpuinfo`.
fn processors(cpuinfo: &str) -> (u32, String, String) {
    let values = |key: &'static str| {
        let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.filter(move |(k, _)| k.trim() == key).map(|(_, v)| v.trim())
    };
    let model = values("model name").next().unwrap_or_default().to_owned();
    let flags = values("flags").next().unwrap_or_default();
    let virtualisation = flags.split_whitespace().find(|f| ["svm", "vmx"].contains(f));
    (
        u32::try_from(values("processor").count()).unwrap_or(0),
        model,
        virtualisation.unwrap_or_default().into(),
    )
}

fn memory_mib(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|t| t.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

fn interfaces(class: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(class).into_iter().flatten().flatten();
    let real = entries.filter(|e| e.path().join("device").exists());
    let with_mac = real.filter_map(|e| {
        let mac = fs::read_to_string(e.path().join("address")).ok()?;
        let uevent = fs::read_to_string(e.path().join("uevent")).ok()?;
        Some((property(&uevent, "INTERFACE")?.to_owned(), mac.trim().to_owned()))
    });
    with_mac.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says() {
        let cpu = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu svm avx\n\nprocessor\t: 1\nmodel name\t: A CPU\n";
        assert_eq!(processors(cpu), (2, "A CPU".into(), "svm".into()));
        assert_eq!(processors(""), (0, String::new(), String::new()));
        assert_eq!(memory_mib("MemTotal:        1016852 kB\nMemFree: 1 kB\n"), 993);
        assert_eq!(memory_mib("nonsense"), 0);
    }
}
