//! Why the launcher stops: a message for a person and a fixed exit code for a program.

use std::fmt;

/// Exit codes, the same for every program of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Ended because someone asked for it.
    Stopped = 0,
    /// A flag, or the model's configuration.
    Config = 10,
    /// A missing, corrupt or unreachable file.
    Files = 11,
    /// More memory than there is.
    Memory = 12,
    /// The address cannot be listened on.
    Port = 13,
    /// A device, or the meeting of the shards.
    Device = 14,
    /// A fault of the program.
    Bug = 70,
    /// A process died too often.
    RestartBudget = 75,
}

impl Code {
    /// The meaning of an exit code that a child ended with, if it is one that a restart cannot mend.
    pub fn permanent(status: i32) -> Option<Self> {
        [
            Self::Config,
            Self::Files,
            Self::Memory,
            Self::Port,
            Self::Device,
        ]
        .into_iter()
        .find(|code| *code as i32 == status)
    }
}

/// A reason to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// What was asked, what was found, what to do next.
    pub message: String,
}

impl Failure {
    /// A failure with its message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// A wrong flag or configuration.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Code::Config, message)
    }

    /// An operation on this system that has no reason to fail.
    pub fn system(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(Code::Bug, format!("{what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
