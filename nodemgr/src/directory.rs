//! Who may log in where: what the SSH front door knows of slivers, and nothing more.

use std::path::PathBuf;
use std::sync::Arc;

use commonage_nodemgr_api::http::SliverState;

/// A slice one can log in to on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// OpenSSH public keys, one a string, exactly as the slice was configured: a malformed one admits nobody.
    pub ssh_keys: Vec<String>,
    /// The sliver's vsock, for [`crate::exec::ExecClient::start`]. Exists only while its machine runs.
    pub vsock: PathBuf,
    /// How far the sliver is: commands can be run while it is starting (once configured) or running.
    pub state: SliverState,
}

/// Looks slices up. Cheap and without waiting, so it can be asked at each login anew: keys that were taken away count at once.
pub trait Directory: Send + Sync + 'static {
    /// The sliver of `slice` (untrusted text), if the node has one.
    fn login(&self, slice: &str) -> Option<Login>;
}

impl<D: Directory + ?Sized> Directory for Arc<D> {
    fn login(&self, slice: &str) -> Option<Login> {
        (**self).login(slice)
    }
}
