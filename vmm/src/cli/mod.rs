//! What is typed.

pub mod client;
pub mod connect;
pub mod ctl;
pub mod run;
pub mod show;
pub mod terminal;
