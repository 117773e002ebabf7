//! One error type, worded the same in Rust and in Python: which argument, what was expected, what came.

use std::fmt;

/// Why a call was refused. Nothing has changed when one of these is returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// An array has the wrong shape.
    Shape { arg: &'static str, expected: String, got: String },
    /// An argument is out of its range.
    Value { arg: &'static str, expected: String, got: String },
    /// More positions were asked for than the cache was made for.
    Capacity { needed: usize, remaining: usize },
    /// A buffer of this many bytes cannot be had.
    Memory { bytes: usize },
    /// A saved state is damaged or belongs to another plan.
    State(String),
}

impl Error {
    #[cold]
    pub(crate) fn shape(arg: &'static str, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Error::Shape { arg, expected: expected.to_string(), got: got.to_string() }
    }

    #[cold]
    pub(crate) fn value(arg: &'static str, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Error::Value { arg, expected: expected.to_string(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { arg, expected, got } => write!(f, "{arg}: expected shape {expected}, got {got}"),
            Error::Value { arg, expected, got } => write!(f, "{arg}: expected {expected}, got {got}"),
            Error::Capacity { needed, remaining } => {
                write!(f, "the cache has room for {remaining} more positions, got {needed}")
            }
            Error::Memory { bytes } => write!(f, "cannot allocate {bytes} bytes"),
            Error::State(why) => write!(f, "state: {why}"),
        }
    }
}

impl std::error::Error for Error {}

/// A shape as Python prints it: `()`, `(3,)`, `(2, 3)`.
pub(crate) fn tuple(shape: &[usize]) -> String {
    match shape {
        [n] => format!("({n},)"),
        _ => format!("({})", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}
