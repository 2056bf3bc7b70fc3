//! Which blocks are worth a write to disk.

pub use crate::config::nvme::Admission;

/// What is known of a block that could be spilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// More than one request has used it since it came to the dram tier.
    pub reused: bool,
    /// The store has free extents: nothing is evicted for it.
    pub room: bool,
    /// Little of the write budget is left: it is for what pays.
    pub scarce: bool,
}

impl Admission {
    /// Whether to write this block.
    pub fn admits(self, candidate: Candidate) -> bool {
        match self {
            Self::All => !candidate.scarce || candidate.reused,
            Self::Reused => candidate.reused || candidate.room && !candidate.scarce,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_store_or_a_short_budget_is_choosy() {
        let fresh = Candidate { reused: false, room: false, scarce: false };
        assert!(Admission::All.admits(fresh));
        assert!(!Admission::Reused.admits(fresh));
        assert!(Admission::Reused.admits(Candidate { room: true, ..fresh }));
        assert!(Admission::Reused.admits(Candidate { reused: true, ..fresh }));
        for admission in [Admission::All, Admission::Reused] {
            let short = Candidate { room: true, scarce: true, ..fresh };
            assert!(!admission.admits(short) && admission.admits(Candidate { reused: true, ..short }));
        }
    }
}
