//! tote-api.
