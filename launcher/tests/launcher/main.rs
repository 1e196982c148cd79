//! The launcher as a program, over stand-ins for router and shards.

mod start;
mod supervise;
mod tree;
