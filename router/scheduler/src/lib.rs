//! The pure core of the router: events and the time go in, a step comes out. No I/O, no clock, no randomness.

/// Names one registration of an adapter; never reused within the router's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);
