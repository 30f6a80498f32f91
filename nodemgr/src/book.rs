//! The book of rights: which rcaps were granted, to what, and which slivers are bound to them.
//!
//! Pure: each verb looks at the book and the time and answers with what to change, or why not. The caller first commits the
//! [`Change`]s to the database, then applies them here, so the book never knows what the disk does not.
//!
//! Always holds: a bound grant has exactly one sliver and a sliver exactly one grant; no two slivers share a slice or a uid.

use std::collections::{BTreeMap, BTreeSet};

use commonage_isolation::{Admitted, Capacity, Commitment, Free, Refused, admit, free, readmit};
use commonage_isolation_api::{Interval, Privilege, Rcap, Rspec, SliceName};
use commonage_nodemgr_api::error::{ApiError, Code};
use commonage_nodemgr_api::http::{Acquired, PortGrant, SliverConfig};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The slice whose sliver the node itself keeps: PLC's agent.
pub const AGENT: &str = "plc_agent";
/// First user id of a sliver.
pub const FIRST_UID: u32 = 100_000;
/// Most rights there may be at once, bound or not: disjoint intervals would otherwise allow any number.
pub const MAX_GRANTS: usize = 4096;

/// A right that was granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The right.
    pub rcap: Rcap,
    /// What to.
    pub rspec: Rspec,
    /// Its ports.
    pub ports: PortGrant,
    /// The slice that acquired it.
    pub acquired_by: SliceName,
    /// The slice it is bound to.
    pub bound_to: Option<SliceName>,
    /// Order of granting: when a node comes back smaller, older rights go first.
    pub seq: u64,
}

impl Grant {
    /// As callers see it.
    pub fn view(&self) -> Acquired {
        Acquired {
            rcap: self.rcap.clone(),
            rspec: self.rspec.clone(),
            ports: self.ports.clone(),
            bound_to: self.bound_to.clone(),
        }
    }

    fn holder(&self) -> String {
        match &self.bound_to {
            Some(slice) => format!("slice {slice}"),
            None => format!("an unbound right of {}", self.acquired_by),
        }
    }
}

/// A sliver that was bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliverRecord {
    /// Its slice.
    pub slice: SliceName,
    /// Its right.
    pub rcap: Rcap,
    /// Its user id, never used before on this node.
    pub uid: u32,
    /// The slice that bound it.
    pub bound_by: SliceName,
    /// How it starts.
    pub config: SliverConfig,
    /// Its deletion has begun and must be finished, also by the next node manager.
    #[serde(default)]
    pub deleting: bool,
    /// Why its machine ended, if it is to stay so.
    #[serde(default)]
    pub stopped: Option<String>,
}

/// A change to the book, to be made durable first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Adds or replaces a grant.
    PutGrant(Grant),
    /// Removes a grant.
    RemoveGrant(Rcap),
    /// Adds or replaces a sliver.
    PutSliver(SliverRecord),
    /// Removes a sliver.
    RemoveSliver(SliceName),
    /// The next user id.
    NextUid(u32),
}

/// The book.
#[derive(Debug, Clone)]
pub struct Book {
    /// What the node has.
    pub capacity: Capacity,
    grants: BTreeMap<Rcap, Grant>,
    slivers: BTreeMap<SliceName, SliverRecord>,
    next_uid: u32,
}

/// What to change and what to answer.
pub type Decision<T> = Result<(Vec<Change>, T), ApiError>;

impl Book {
    /// An empty book.
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity, grants: BTreeMap::new(), slivers: BTreeMap::new(), next_uid: FIRST_UID }
    }

    /// Applies what is durable.
    pub fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::PutGrant(g) => drop(self.grants.insert(g.rcap.clone(), g)),
                Change::RemoveGrant(rcap) => drop(self.grants.remove(&rcap)),
                Change::PutSliver(s) => drop(self.slivers.insert(s.slice.clone(), s)),
                Change::RemoveSliver(slice) => drop(self.slivers.remove(&slice)),
                Change::NextUid(uid) => self.next_uid = uid,
            }
        }
    }

    /// The sliver of a slice.
    pub fn sliver(&self, slice: &SliceName) -> Option<&SliverRecord> {
        self.slivers.get(slice)
    }

    /// All slivers.
    pub fn slivers(&self) -> impl Iterator<Item = &SliverRecord> {
        self.slivers.values()
    }

    /// A sliver's record and grant.
    pub fn bound(&self, slice: &SliceName) -> Option<(&SliverRecord, &Grant)> {
        let record = self.slivers.get(slice)?;
        Some((record, self.grants.get(&record.rcap)?))
    }

    /// What is free in `interval`.
    pub fn free(&self, interval: Interval) -> Free {
        let holders = self.holders(|_| true);
        free(&self.capacity, &commitments(&holders), interval)
    }

    /// What is free at `now`.
    pub fn free_now(&self, now: Timestamp) -> Free {
        let end = now.saturating_add(SignedDuration::from_secs(1)).unwrap_or(Timestamp::MAX);
        self.free(Interval { start: now, end })
    }

    /// What a slice may do. Its own word doesn't count: only the rspec its sliver is bound to.
    pub fn privileges(&self, slice: &SliceName) -> BTreeSet<Privilege> {
        self.bound(slice).map(|(_, grant)| grant.rspec.privileges.clone()).unwrap_or_default()
    }

    /// Turns free capacity into a right.
    ///
    /// # Errors
    /// The caller may not, or the node has not that much.
    pub fn acquire(
        &self,
        caller: &SliceName,
        rspec: Rspec,
        rcap: Rcap,
        now: Timestamp,
    ) -> Decision<Acquired> {
        let own = self.require_acquire(caller)?;
        if let Some(more) = rspec.privileges.difference(&own).next() {
            let name = serde_json::to_string(more).unwrap_or_default();
            return Err(ApiError::new(
                Code::Forbidden,
                format!("{caller} has no privilege {name}, so it cannot pass it on"),
            )
            .hint("leave it out of rspec.privileges, or have PLC grant it to the slice"));
        }
        if self.grants.len() >= MAX_GRANTS {
            return Err(ApiError::new(
                Code::OverCapacity,
                format!("this node keeps at most {MAX_GRANTS} rights at once"),
            )
            .hint("release rights that are not needed"));
        }
        let holders = self.holders(|_| true);
        let admitted = admit(&self.capacity, &commitments(&holders), rspec, now).map_err(refused)?;
        let grant = self.grant(admitted, rcap, caller.clone(), None);
        Ok((vec![Change::PutGrant(grant.clone())], grant.view()))
    }

    /// Binds a right to a slice: from now on the node keeps its sliver.
    ///
    /// # Errors
    /// The right does not exist, is bound or over, or the slice has a sliver here.
    pub fn bind(
        &self,
        caller: &SliceName,
        slice: SliceName,
        rcap: &Rcap,
        config: SliverConfig,
        now: Timestamp,
    ) -> Decision<SliverRecord> {
        let grant = self.unbound(rcap)?;
        if self.slivers.contains_key(&slice) {
            return Err(ApiError::new(
                Code::Conflict,
                format!("slice {slice} has a sliver on this node already"),
            )
            .hint(
                "delete that sliver first, or change its configuration with PUT /v1/slivers/{slice}/config",
            ));
        }
        self.admitted(grant, now).map_err(refused)?;
        let mut grant = grant.clone();
        grant.bound_to = Some(slice.clone());
        let (changes, record) = self.sliver_for(grant, slice, caller.clone(), config)?;
        Ok((changes, record))
    }

    /// A right, unless it is over.
    ///
    /// # Errors
    /// There is no such right.
    pub fn get(&self, rcap: &Rcap) -> Result<&Grant, ApiError> {
        self.grants.get(rcap).ok_or_else(|| {
            ApiError::new(
                Code::NotFound,
                "this node has no such rcap; it may have been released, or its interval is over",
            )
            .hint("list yours with GET /v1/rcaps, or acquire one")
        })
    }

    /// The rights a slice acquired.
    pub fn acquired_by(&self, caller: &SliceName) -> Vec<Acquired> {
        self.grants.values().filter(|g| g.acquired_by == *caller).map(Grant::view).collect()
    }

    /// Gives an unbound right back.
    ///
    /// # Errors
    /// It does not exist or is bound.
    pub fn release(&self, rcap: &Rcap) -> Decision<()> {
        let grant = self.unbound(rcap)?;
        Ok((vec![Change::RemoveGrant(grant.rcap.clone())], ()))
    }

    /// Moves a right's end and perhaps its share; its ports stay.
    ///
    /// # Errors
    /// The caller may not, or the longer interval does not fit.
    pub fn renew(
        &self,
        caller: &SliceName,
        rcap: &Rcap,
        end: Timestamp,
        share: Option<u32>,
        now: Timestamp,
    ) -> Decision<Acquired> {
        self.require_acquire(caller)?;
        let grant = self.get(rcap)?;
        if grant.bound_to.as_ref().is_some_and(|s| s.as_str() == AGENT) {
            return Err(kept_by_node());
        }
        let mut rspec = grant.rspec.clone();
        rspec.interval.end = end;
        rspec.share = share.unwrap_or(rspec.share);
        let holders = self.holders(|g| g.rcap != *rcap);
        let others = commitments(&holders);
        let admitted = readmit(&self.capacity, &others, rspec, grant.ports.clone(), now).map_err(refused)?;
        let grant = Grant { rspec: admitted.into_parts().0, ..grant.clone() };
        Ok((vec![Change::PutGrant(grant.clone())], grant.view()))
    }

    /// Changes how a sliver starts.
    ///
    /// # Errors
    /// The caller did not bind it, or the base differs.
    pub fn configure(
        &self,
        caller: &SliceName,
        slice: &SliceName,
        config: SliverConfig,
    ) -> Decision<SliverRecord> {
        let record = self.bound_by(caller, slice)?;
        if record.config.base != config.base {
            let (is, wanted) = (&record.config.base, &config.base);
            return Err(ApiError::new(
                Code::Conflict,
                format!("slice {slice} was bound with base {is:?}, not {wanted:?}"),
            )
            .hint("a base is fixed once bound: delete the sliver and bind a new one"));
        }
        let record = SliverRecord { config, stopped: None, ..record.clone() };
        Ok((vec![Change::PutSliver(record.clone())], record))
    }

    /// The sliver of `slice`, if `caller` bound it. Who did not is not told whether it exists.
    ///
    /// # Errors
    /// It did not, or there is none.
    pub fn bound_by(&self, caller: &SliceName, slice: &SliceName) -> Result<&SliverRecord, ApiError> {
        self.slivers.get(slice).filter(|s| s.bound_by == *caller).ok_or_else(|| {
            ApiError::new(Code::NotFound, format!("{caller} bound no sliver of slice {slice} on this node"))
                .hint("list yours with GET /v1/slivers")
        })
    }

    /// Begins the deletion of a sliver that `caller` bound; tells its user id.
    ///
    /// # Errors
    /// It did not, or the node itself keeps it.
    pub fn delete(&self, caller: &SliceName, slice: &SliceName) -> Decision<u32> {
        let uid = self.bound_by(caller, slice)?.uid;
        if slice.as_str() == AGENT {
            return Err(kept_by_node());
        }
        Ok((self.condemn(slice, uid), uid))
    }

    /// Marks a sliver as being deleted. A later one of the same slice has another `uid`, and stays.
    pub fn condemn(&self, slice: &SliceName, uid: u32) -> Vec<Change> {
        self.amend(slice, uid, |record| record.deleting = true)
    }

    /// Notes that a sliver's machine ended and is not to be started again.
    pub fn stop(&self, slice: &SliceName, uid: u32, reason: String) -> Vec<Change> {
        self.amend(slice, uid, |record| record.stopped = Some(reason))
    }

    fn amend(&self, slice: &SliceName, uid: u32, amend: impl FnOnce(&mut SliverRecord)) -> Vec<Change> {
        let Some(mut record) = self.slivers.get(slice).filter(|r| r.uid == uid).cloned() else {
            return Vec::new();
        };
        amend(&mut record);
        vec![Change::PutSliver(record)]
    }

    /// Forgets a sliver of which nothing is left, and its right.
    pub fn forget(&self, slice: &SliceName, uid: u32) -> Vec<Change> {
        match self.slivers.get(slice).filter(|r| r.uid == uid) {
            Some(record) => {
                vec![Change::RemoveSliver(slice.clone()), Change::RemoveGrant(record.rcap.clone())]
            }
            None => Vec::new(),
        }
    }

    /// Unbound rights that are over at `now`, and the next moment one will be.
    pub fn lapsed(&self, now: Timestamp) -> (Vec<Change>, Option<Timestamp>) {
        let unbound = || self.grants.values().filter(|g| g.bound_to.is_none());
        let over = unbound().filter(|g| g.rspec.interval.end <= now);
        let next = unbound().map(|g| g.rspec.interval.end).filter(|end| *end > now).min();
        (over.map(|g| Change::RemoveGrant(g.rcap.clone())).collect(), next)
    }

    /// The right of a sliver that is about to start, admitted again: the node may have come back with less than it had.
    /// Older rights go first, so each node start decides alike.
    ///
    /// # Errors
    /// It no longer fits.
    pub fn admitted(&self, grant: &Grant, now: Timestamp) -> Result<Admitted<Rspec>, Refused> {
        let holders = self.holders(|g| g.seq < grant.seq);
        readmit(&self.capacity, &commitments(&holders), grant.rspec.clone(), grant.ports.clone(), now)
    }

    /// What makes sure that the node's own agent has a sliver with this rspec (but for ports, which stay as they were).
    ///
    /// # Errors
    /// It does not fit.
    pub fn keep_agent(&self, rspec: Rspec, config: SliverConfig, rcap: Rcap, now: Timestamp) -> Decision<()> {
        let slice: SliceName = AGENT.parse().map_err(|e| ApiError::new(Code::Internal, format!("{e}")))?;
        if let Some((record, grant)) = self.bound(&slice) {
            let rspec =
                Rspec { interval: rspec.interval, privileges: rspec.privileges, ..grant.rspec.clone() };
            let grant = Grant { rspec, ..grant.clone() };
            let record = SliverRecord { config, deleting: false, stopped: None, ..record.clone() };
            return Ok((vec![Change::PutGrant(grant), Change::PutSliver(record)], ()));
        }
        let holders = self.holders(|_| true);
        let admitted = admit(&self.capacity, &commitments(&holders), rspec, now).map_err(refused)?;
        let grant = self.grant(admitted, rcap, slice.clone(), Some(slice.clone()));
        let (changes, _) = self.sliver_for(grant, slice.clone(), slice, config)?;
        Ok((changes, ()))
    }

    fn grant(
        &self,
        a: Admitted<Rspec>,
        rcap: Rcap,
        acquired_by: SliceName,
        bound_to: Option<SliceName>,
    ) -> Grant {
        let seq = self.grants.values().map(|g| g.seq).max().unwrap_or(0).saturating_add(1);
        let (rspec, ports) = a.into_parts();
        Grant { rcap, rspec, ports, acquired_by, bound_to, seq }
    }

    fn sliver_for(
        &self,
        grant: Grant,
        slice: SliceName,
        bound_by: SliceName,
        config: SliverConfig,
    ) -> Decision<SliverRecord> {
        let uid = self.next_uid;
        let next = uid
            .checked_add(1)
            .ok_or_else(|| ApiError::new(Code::OverCapacity, "this node has used all user ids"))?;
        let record = SliverRecord {
            slice,
            rcap: grant.rcap.clone(),
            uid,
            bound_by,
            config,
            deleting: false,
            stopped: None,
        };
        let changes = vec![Change::PutGrant(grant), Change::PutSliver(record.clone()), Change::NextUid(next)];
        Ok((changes, record))
    }

    fn unbound(&self, rcap: &Rcap) -> Result<&Grant, ApiError> {
        let grant = self.get(rcap)?;
        match &grant.bound_to {
            None => Ok(grant),
            Some(slice) => Err(ApiError::new(Code::Conflict, format!("this rcap is bound to slice {slice}"))
                .hint("delete that sliver: its rcap goes with it")),
        }
    }

    fn require_acquire(&self, caller: &SliceName) -> Result<BTreeSet<Privilege>, ApiError> {
        let own = self.privileges(caller);
        if own.contains(&Privilege::Acquire) {
            return Ok(own);
        }
        Err(ApiError::new(
            Code::Forbidden,
            format!("slice {caller} has not the privilege \"acquire\" on this node"),
        )
        .hint("ask PLC for resources, or a broker for an rcap and bind it"))
    }

    fn holders(&self, which: impl Fn(&Grant) -> bool) -> Vec<(String, &Grant)> {
        self.grants.values().filter(|g| which(g)).map(|g| (g.holder(), g)).collect()
    }
}

fn commitments<'a>(holders: &'a [(String, &'a Grant)]) -> Vec<Commitment<'a>> {
    holders.iter().map(|(holder, g)| Commitment { holder, rspec: &g.rspec, ports: &g.ports }).collect()
}

/// Admission's refusal as callers see it.
pub fn refused(e: Refused) -> ApiError {
    use commonage_isolation::PortError::OutOfRange;
    let code = match e {
        Refused::Rspec(_) | Refused::Past { .. } | Refused::Ports(OutOfRange { .. }) => Code::Invalid,
        Refused::Short { .. } | Refused::Ports(_) => Code::OverCapacity,
    };
    ApiError::new(code, e.to_string()).hint("GET /v1/node says what is free now")
}

fn kept_by_node() -> ApiError {
    ApiError::new(Code::Forbidden, format!("{AGENT} is kept by the node itself"))
        .hint("leave it alone: it is PLC's way to this node")
}

#[cfg(test)]
#[path = "book_test.rs"]
mod tests;
