//! The sliver the node keeps for PLC: how its agent is made.
//!
//! It is bound for good: its interval begins long ago (the clock may be wrong at the first start) and ends far in the future. It
//! has every privilege, because privileges can only be passed on, and PLC is where they come from.

use std::collections::BTreeSet;

use commonage_isolation_api::{Interval, Limits, Link, Ports, Privilege, Rspec};
use commonage_nodemgr_api::Bytes;
use commonage_nodemgr_api::http::{File, RestartPolicy, SliverConfig};
use jiff::Timestamp;

use crate::manager::Settings;

/// Far enough: 9999-01-01.
const FOREVER: i64 = 253_370_764_800;
/// The sleep keeps an agent that cannot start from taking the processor.
const BOOT_SCRIPT: &str = "#!/bin/sh
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin
(
    trap '' HUP
    while :; do
        /usr/sbin/plc-agent
        echo \"plc-agent ended with status $?; starting it again\"
        sleep 2
    done
) </dev/null >/dev/console 2>&1 &
";

/// What the agent may use, and how it starts, but for its [`files`].
pub fn sliver() -> (Rspec, SliverConfig) {
    let end = Timestamp::from_second(FOREVER).unwrap_or(Timestamp::MAX);
    let rspec = Rspec {
        share: 2000,
        vcpus: 1,
        memory_mib: 64,
        disk_mib: 64,
        link: Link { guaranteed_bps: 0, cap_bps: 1_000_000_000 },
        ports: Ports { block: 64, tcp: BTreeSet::new(), udp: BTreeSet::new() },
        limits: Limits { pids: 64 },
        privileges: BTreeSet::from([
            Privilege::Acquire,
            Privilege::EnvironmentService,
            Privilege::AdminSniffer,
            Privilege::Sensors,
        ]),
        interval: Interval { start: Timestamp::UNIX_EPOCH, end },
    };
    let config = SliverConfig {
        base: "agent".to_owned(),
        ssh_keys: Vec::new(),
        boot_script: BOOT_SCRIPT.to_owned(),
        files: Vec::new(),
        restart: RestartPolicy::Always,
    };
    (rspec, config)
}

/// What is laid in the agent's sliver at each start: the node's configuration. It holds the node's private key, so it goes from memory to
/// memory (a guest's `/run`) and is never part of what the database keeps.
pub fn files(settings: &Settings) -> Vec<File> {
    let node_json = std::fs::read(&settings.node_config).inspect_err(|e| {
        tracing::error!("cannot read {}: {e}; the agent cannot reach PLC", settings.node_config.display())
    });
    let path = "/run/commonage/node.json".to_owned();
    node_json.map(|json| File { path, mode: 0o600, contents: Bytes(json) }).into_iter().collect()
}
