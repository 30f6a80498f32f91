//! Whether a sliver whose machine ended is started again: a pure decision.

use commonage_nodemgr_api::http::RestartPolicy;

use crate::sliver::EndKind;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Start it again, after a wait.
    Again,
    /// Leave it, visible, until somebody configures or deletes it.
    Stopped,
}

/// Decides. A reboot asks for a start, so it is no end; a machine that never came as far as its tenant has nothing to obey yet.
pub fn decide(policy: RestartPolicy, kind: EndKind, was_configured: bool) -> Next {
    let again = match (policy, kind) {
        _ if !was_configured => true,
        (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure, EndKind::Reboot | EndKind::Failure) => true,
        (RestartPolicy::OnFailure, EndKind::Halt) | (RestartPolicy::Never, _) => false,
    };
    if again { Next::Again } else { Next::Stopped }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EndKind::{Failure, Halt, Reboot};
    use RestartPolicy::{Always, Never, OnFailure};

    #[test]
    fn each_policy_does_what_its_name_says() {
        let again: Vec<_> = [Always, OnFailure, Never]
            .into_iter()
            .flat_map(|policy| [Reboot, Halt, Failure].map(|kind| decide(policy, kind, true) == Next::Again))
            .collect();
        assert_eq!(again, [true, true, true, true, false, true, false, false, false]);
        assert_eq!(decide(Never, Halt, false), Next::Again);
    }
}
