//! What a program outside needs to know of a virtual machine: the [configuration](config) it starts from and the typed
//! [protocol](control) of its control socket.
#![forbid(unsafe_code)]

pub mod config;
pub mod control;

pub use config::{DiskConfig, JailConfig, MachineConfig, NetConfig, RateLimit, Start, VsockConfig};
pub use control::{BlockMetrics, ExitReason, Metrics, Request, Response, RunState, VcpuMetrics};

/// vsock port on which a guest's init listens for the request to shut down: whoever connects asks for it. The machine connects there for
/// [`control::Request::Stop`] with a grace; a guest where nobody listens is ended at once.
pub const POWER_PORT: u32 = 809;

#[cfg(test)]
mod tests {
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::*;

    const PAGE: &str = include_str!("../../../docs/machine.md");

    /// `text` means something, and the same once it is written again.
    fn same<T: DeserializeOwned + Serialize>(text: &str) {
        let value: T = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let again = serde_json::to_value(&value).unwrap();
        let first: serde_json::Value = serde_json::from_str(text).unwrap();
        for (name, field) in first.as_object().unwrap() {
            assert_eq!(Some(field), again.get(name), "{name} of {text}");
        }
    }

    #[test]
    fn the_page_shows_what_the_types_say() {
        let requests: Vec<&str> = PAGE.split('`').filter(|words| words.starts_with("{\"request\"")).collect();
        assert_eq!(requests.len(), 12, "every request has a row");
        requests.iter().for_each(|line| same::<Request>(line));
        let lines = |start: &'static str| PAGE.lines().filter(move |line| line.starts_with(start));
        assert_eq!(lines("{\"response\"").count(), 10);
        lines("{\"response\"").for_each(same::<Response>);
        assert_eq!(lines("{\"start\"").count(), 2);
        lines("{\"start\"").for_each(same::<MachineConfig>);
    }
}
