//! The SSH front door: login name = slice name, commands run through [`crate::exec`].
