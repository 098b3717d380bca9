//! What an image is, without anything that could fetch or run one.
