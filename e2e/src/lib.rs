//! A real cluster on one machine, and the scenarios that run on it.
