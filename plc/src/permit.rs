//! Who may do what: PDN-04-017 §3.3, as functions of values.
//!
//! Every call asks one function here first. A slice's operations belong to its site's PIs and its owners; being an admin helps
//! with none of them. Whoever is several things at once is taken for the one that may do more.

use std::collections::BTreeSet;

use commonage_isolation_api::{NodeId, SiteName};
use commonage_plc_api::rest::{Principal, PrincipalName, Resources, Role, SetResources};
use commonage_plc_api::{ApiError, Code};
use jiff::{SignedDuration, Timestamp};

/// Who made the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A principal.
    Principal(Principal),
    /// A node.
    Node(NodeId),
}

/// What is asked of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliceCall {
    /// create_slice.
    Create,
    /// delete_slice.
    Delete,
    /// set_owners.
    SetOwners,
    /// set_state.
    SetState,
    /// set_resources of a slice that is not instantiated.
    SetFirstResources,
    /// set_resources of an instantiated slice.
    Renew,
    /// instantiate_slice.
    Instantiate,
    /// Reading.
    Read,
    /// Privileges at the node manager, which only PLC's administration gives (§4.1).
    SetPrivileges,
}

/// As what a caller may do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// As an admin.
    Admin,
    /// As a PI of the site.
    Pi,
    /// As an owner.
    Owner,
}

type Allowed<T> = Result<T, ApiError>;

impl Caller {
    /// The calling principal.
    ///
    /// # Errors
    /// A node calls.
    pub fn principal(&self) -> Allowed<&Principal> {
        match self {
            Self::Principal(principal) => Ok(principal),
            Self::Node(node) => Err(forbidden(format!("node {node} may not do that"))
                .hint("use a principal's certificate, not a node's")),
        }
    }

    /// The calling node.
    ///
    /// # Errors
    /// A principal calls.
    pub fn node(&self) -> Allowed<&NodeId> {
        match self {
            Self::Node(node) => Ok(node),
            Self::Principal(p) => Err(forbidden(format!("{} is no node", p.name))
                .hint("only a node may call this, with the certificate on its CD")),
        }
    }

    /// The calling principal, an admin.
    ///
    /// # Errors
    /// Anybody else calls.
    pub fn admin(&self) -> Allowed<&Principal> {
        let p = self.principal()?;
        if is(p, Role::Admin) {
            return Ok(p);
        }
        Err(forbidden(format!("{} is no administrator of PLC", p.name)).hint("ask an administrator of PLC"))
    }

    /// The calling principal, an admin or a PI of `site`.
    ///
    /// # Errors
    /// Anybody else calls.
    pub fn keeper(&self, site: &SiteName) -> Allowed<Standing> {
        let p = self.principal()?;
        if is(p, Role::Admin) {
            return Ok(Standing::Admin);
        }
        if is_pi(p, site) {
            return Ok(Standing::Pi);
        }
        Err(forbidden(format!("{} is no PI of site {site}", p.name)).hint(format!("ask a PI of site {site}")))
    }

    /// Whether the caller may make (or delete) a principal with these roles at this site.
    ///
    /// # Errors
    /// It may not.
    pub fn may_keep_principal(&self, site: Option<&SiteName>, roles: &BTreeSet<Role>) -> Allowed<()> {
        let p = self.principal()?;
        if is(p, Role::Admin) {
            return Ok(());
        }
        let only_user = roles.iter().all(|r| *r == Role::User);
        match site {
            Some(site) if is_pi(p, site) && only_user => Ok(()),
            Some(site) if is_pi(p, site) => {
                Err(forbidden(format!("{} may keep users of site {site} only", p.name))
                    .hint("ask an administrator of PLC for PIs and administrators"))
            }
            _ => Err(forbidden(format!("{} may not keep principals there", p.name))
                .hint("a site's PI keeps the users of that site, PLC's administrators everybody")),
        }
    }

    /// Whether the caller may read about `other`.
    ///
    /// # Errors
    /// It may not.
    pub fn may_read_principal(&self, other: &Principal) -> Allowed<()> {
        let p = self.principal()?;
        let pi = other.site.as_ref().is_some_and(|site| is_pi(p, site));
        if p.name == other.name || pi || is(p, Role::Admin) {
            return Ok(());
        }
        Err(forbidden(format!("{} may not see {}", p.name, other.name)).hint("ask a PI of that site"))
    }

    /// Whether the caller may change `other`'s SSH keys: itself and its site's PI.
    ///
    /// # Errors
    /// It may not.
    pub fn may_change_keys(&self, other: &Principal) -> Allowed<()> {
        let p = self.principal()?;
        // Of plain users only: another PI's or an administrator's key opens slices that are none of this site's affairs.
        let plain = other.roles.iter().all(|role| *role == Role::User);
        if p.name == other.name || (plain && other.site.as_ref().is_some_and(|site| is_pi(p, site))) {
            return Ok(());
        }
        Err(forbidden(format!("{} may not change the SSH keys of {}", p.name, other.name))
            .hint("only that principal and, for plain users, a PI of its site may"))
    }

    /// As what the caller may make this call on a slice of `site` with these owners.
    ///
    /// # Errors
    /// It may not.
    pub fn may_call_slice(
        &self,
        call: SliceCall,
        site: &SiteName,
        owners: &BTreeSet<PrincipalName>,
    ) -> Allowed<Standing> {
        use SliceCall as C;
        let p = self.principal()?;
        let (pi, owner, admin) = (is_pi(p, site), owners.contains(&p.name), is(p, Role::Admin));
        let (standing, who) = match call {
            C::Create | C::SetFirstResources => (pi.then_some(Standing::Pi), "a PI of its site"),
            C::Delete | C::SetOwners | C::SetState | C::Renew | C::Instantiate => {
                let owner = owner.then_some(Standing::Owner);
                (pi.then_some(Standing::Pi).or(owner), "a PI of its site or one of its owners")
            }
            C::Read => {
                let owner = owner.then_some(Standing::Owner);
                let standing = pi.then_some(Standing::Pi).or(admin.then_some(Standing::Admin)).or(owner);
                (standing, "a PI of its site, one of its owners or an administrator")
            }
            C::SetPrivileges => (admin.then_some(Standing::Admin), "an administrator of PLC"),
        };
        standing.ok_or_else(|| {
            let what = match call {
                C::Create => "create a slice",
                C::Delete => "delete the slice",
                C::SetOwners => "set the owners of the slice",
                C::SetState => "set the boot state of the slice",
                C::SetFirstResources => "set the resources of a slice that is not instantiated yet",
                C::Renew => "renew the slice",
                C::Instantiate => "instantiate the slice",
                C::Read => "see the slice",
                C::SetPrivileges => "give the slice privileges",
            };
            forbidden(format!("{} may not {what}", p.name)).hint(format!("that takes {who} ({site})"))
        })
    }
}

/// Whether an instantiated slice's resources may be changed so. A PI changes them arbitrarily; an owner may reduce or keep the share
/// and extend or keep the time, up to `max_lifetime` from now.
///
/// # Errors
/// It may not.
pub fn renewal(
    standing: Standing,
    present: &Resources,
    wanted: &SetResources,
    now: Timestamp,
    max_lifetime: SignedDuration,
) -> Allowed<()> {
    if standing == Standing::Pi {
        return Ok(());
    }
    let other = |name: &str| {
        Err(forbidden(format!("an owner may not change the {name} of an instantiated slice"))
            .hint("leave it out to keep it as it is, or ask a PI of the site"))
    };
    if wanted.share > present.share {
        return Err(forbidden(format!(
            "an owner may not raise the share from {} to {}",
            present.share, wanted.share
        ))
        .hint("keep or reduce the share, or ask a PI of the site"));
    }
    if wanted.end < present.end {
        return Err(forbidden(format!(
            "an owner may not move the end from {} back to {}",
            present.end, wanted.end
        ))
        .hint("extend or keep the time; to stop earlier delete the slice or ask a PI of the site"));
    }
    let latest = now.saturating_add(max_lifetime).unwrap_or(Timestamp::MAX);
    if wanted.end > present.end && wanted.end > latest {
        return Err(forbidden(format!("an owner may not extend a slice beyond {latest}"))
            .hint("ask for an earlier end and renew again later, or ask a PI of the site"));
    }
    if wanted.memory_mib.is_some_and(|m| m != present.memory_mib) {
        return other("memory");
    }
    if wanted.disk_mib.is_some_and(|d| d != present.disk_mib) {
        return other("disk");
    }
    if wanted.ports.as_ref().is_some_and(|p| *p != present.ports) {
        return other("ports");
    }
    Ok(())
}

/// Whether a principal has a role.
pub fn is(p: &Principal, role: Role) -> bool {
    p.roles.contains(&role)
}

/// Whether a principal is a PI of a site.
pub fn is_pi(p: &Principal, site: &SiteName) -> bool {
    is(p, Role::Pi) && p.site.as_ref() == Some(site)
}

fn forbidden(message: String) -> ApiError {
    ApiError::new(Code::Forbidden, message)
}
