//! What was answered is kept, also when the process is killed in the middle of something.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use commonage_isolation_api::{Interval, Rcap, Rspec};
use jiff::Timestamp;

use super::*;
use crate::book::SliverRecord;
use commonage_nodemgr_api::http::{PortGrant, SliverConfig};

const CHILD: &str = "COMMONAGE_TEST_DB";

fn grant(seq: u64) -> Grant {
    let interval = Interval { start: Timestamp::UNIX_EPOCH, end: Timestamp::MAX };
    Grant {
        rcap: Rcap::random().unwrap(),
        rspec: Rspec::modest(interval),
        ports: PortGrant { first: 20_000, last: 20_063, tcp: Default::default(), udp: Default::default() },
        acquired_by: "plc_agent".parse().unwrap(),
        bound_to: None,
        seq,
    }
}

fn rcaps(db: &Db) -> Vec<String> {
    let grants = db.load().unwrap().into_iter();
    grants.filter_map(|c| if let Change::PutGrant(g) = c { Some(g.rcap.to_string()) } else { None }).collect()
}

#[test]
fn what_is_committed_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let (kept, gone) = (grant(1), grant(2));
    let sliver = SliverRecord {
        slice: "princeton_codeen".parse().unwrap(),
        rcap: kept.rcap.clone(),
        uid: 100_000,
        bound_by: "plc_agent".parse().unwrap(),
        config: SliverConfig { base: "mini".into(), ..SliverConfig::default() },
        deleting: true,
        stopped: Some("the guest halted".into()),
    };
    let all = [Change::PutGrant(kept), Change::PutSliver(sliver), Change::NextUid(100_001)];
    {
        let db = Db::open(&path).unwrap();
        assert!(db.load().unwrap().is_empty());
        db.commit(&all).unwrap();
        db.commit(&[Change::PutGrant(gone.clone())]).unwrap();
        db.commit(&[Change::RemoveGrant(gone.rcap)]).unwrap();
        assert!(Db::open(&path).is_err(), "two must not write one database");
    }
    assert_eq!(Db::open(&path).unwrap().load().unwrap(), all);
}

#[test]
fn a_damaged_record_is_named_without_its_secret() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(&dir.path().join("db")).unwrap();
    let rcap = "00112233445566778899aabbccddeeff";
    db.write(|txn| {
        txn.open_table(RCAPS)?.insert(rcap, &b"{}"[..])?;
        Ok(())
    })
    .unwrap();
    let error = db.load().unwrap_err().to_string();
    assert!(error.contains("\"0011…\" in table rcaps") && !error.contains(rcap), "{error}");
}

#[test]
fn every_answered_grant_survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let mut answered: Vec<String> = Vec::new();
    for kill_after in [1, 2, 7, 20, 3] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "db::tests::grants_until_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut fresh = lines.by_ref().map_while(Result::ok).filter_map(granted);
        answered.extend(fresh.by_ref().take(kill_after));
        child.kill().unwrap();
        child.wait().unwrap();
        // What it answered while the signal was on its way counts, too.
        answered.extend(fresh);
        let kept = rcaps(&Db::open(&path).unwrap());
        assert!(answered.len() >= kill_after);
        assert!(answered.iter().all(|rcap| kept.contains(rcap)), "an answered grant is lost");
        // At most the one grant in flight at each kill is there unanswered.
        assert!(kept.len() <= answered.len() + 5);
    }
}

fn granted(line: String) -> Option<String> {
    Some(line.split_once("granted ")?.1.to_owned())
}

/// The child of the test above; nothing by itself.
#[test]
fn grants_until_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let db = Db::open(Path::new(&path)).unwrap();
    for seq in 0.. {
        let grant = grant(seq);
        let rcap = grant.rcap.to_string();
        db.commit(&[Change::PutGrant(grant), Change::NextUid(100_000 + seq as u32)]).unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "granted {rcap}").and_then(|()| out.flush()).unwrap();
    }
}
