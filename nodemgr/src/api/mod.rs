//! The local API: HTTP over connections that a sliver's machine hands over. Which machine that is is the caller's identity; nothing in a request is.
//!
//! - [`serve`]: connections, bounded in number and time, so that a slow or greedy sliver waits for itself only.
//! - [`calls`]: the table of [`commonage_nodemgr_api::http`], one function a call.
//! - `body`: requests in, errors out, each in the one shape.

mod body;
pub mod calls;
mod run;
mod serve;

pub use serve::serve;
