//! tote-controller.
