//! plc/client
