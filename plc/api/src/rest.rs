//! The REST API for principals.
