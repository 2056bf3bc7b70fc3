//! Names of eviction policies, as users write them.

/// Which blocks a tier keeps when it is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum PolicyName {
    /// The most recently used.
    #[default]
    Lru,
    /// S3-FIFO: those that were used while they passed through a small queue.
    S3Fifo,
    /// ARC: recently and often used ones, in shares that follow what comes back.
    Arc,
    /// LRFU: those with the most uses, of which older ones count for less.
    Lrfu,
    /// Those that bring the most hits for their time, as measured on the workload.
    Adaptive,
}

impl PolicyName {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Lru, Self::S3Fifo, Self::Arc, Self::Lrfu, Self::Adaptive];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3Fifo => "s3fifo",
            Self::Arc => "arc",
            Self::Lrfu => "lrfu",
            Self::Adaptive => "adaptive",
        }
    }

    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}
