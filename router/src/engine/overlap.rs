//! Whether a step is sent while another is in flight.

use clap::ValueEnum;

/// Whether steps overlap: the next one is planned and sent while the shards still compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Overlap {
    /// On where the model is not computed by the host's processors. There the router's time between two steps is far
    /// below a step's, and a row whose answer ended in the step before costs the compute of a row.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: each step is planned from the outcome of the one before.
    Off,
}

impl Overlap {
    /// Whether steps overlap on shards that compute on `device`, by its name on the wire.
    pub fn is_on(self, device: &str) -> bool {
        match self {
            Self::Auto => !device.starts_with("cpu"),
            Self::On => true,
            Self::Off => false,
        }
    }
}
