//! Where in an engine's reach a block lies, and a holder: one column with the tiers it has the
//! block in.

use serde::{Deserialize, Serialize};

/// A tier as events name it, fastest first. The one an engine would load from is the first that
/// holds the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FleetTier {
    /// GPU memory (also on CPU builds of vLLM).
    Gpu,
    /// The host's memory.
    Cpu,
    /// The engine's own disk.
    StorageLocal,
    /// Storage elsewhere.
    StorageRemote,
    /// A medium this version does not know. Never taken for GPU memory.
    Unknown,
    /// Expected there after a routing decision, not yet told by an event.
    Speculative,
}

/// Tiers that there are.
pub const TIERS: usize = 6;

/// Tiers that events tell of.
pub const TOLD_TIERS: usize = 5;

/// All tiers, in their order.
pub const ALL: [FleetTier; TIERS] = [
    FleetTier::Gpu,
    FleetTier::Cpu,
    FleetTier::StorageLocal,
    FleetTier::StorageRemote,
    FleetTier::Unknown,
    FleetTier::Speculative,
];

impl FleetTier {
    /// The tier of an event. Publishers from before there were media have GPU memory only.
    pub fn of(medium: Option<&str>, locality: Option<&str>) -> Self {
        let Some(medium) = medium else { return Self::Gpu };
        match (medium, locality) {
            ("GPU", _) => Self::Gpu,
            ("CPU", None | Some("LOCAL")) => Self::Cpu,
            ("STORAGE", Some("LOCAL")) => Self::StorageLocal,
            // Where it is not said, storage may be anywhere: the slower one is assumed.
            ("STORAGE" | "CPU", _) => Self::StorageRemote,
            _ => Self::of_another(medium, locality),
        }
    }

    /// By the names that other publishers than vLLM have, in any case.
    fn of_another(medium: &str, locality: Option<&str>) -> Self {
        let is_elsewhere = locality.is_some_and(|it| !it.eq_ignore_ascii_case("LOCAL"));
        // SGLang and Dynamo tell kinds of one medium apart: CPU_PINNED, CPU_TIER1.
        let base = medium.split('_').next().unwrap_or(medium);
        let is = |names: &[&str]| names.iter().any(|name| base.eq_ignore_ascii_case(name));
        if is(&["GPU", "HBM", "DEVICE"]) {
            Self::Gpu
        } else if is(&["EXTERNAL", "REMOTE"]) || is_elsewhere && is(&["CPU", "DRAM", "HOST", "DISK", "NVME", "SSD"]) {
            Self::StorageRemote
        } else if is(&["CPU", "DRAM", "HOST"]) {
            Self::Cpu
        } else if is(&["DISK", "NVME", "SSD"]) {
            Self::StorageLocal
        } else if is(&["STORAGE"]) {
            if locality.is_some() && !is_elsewhere { Self::StorageLocal } else { Self::StorageRemote }
        } else {
            Self::Unknown
        }
    }

    /// Its bit in a mask.
    pub fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Its name in answers.
    pub fn name(self) -> &'static str {
        ["gpu", "cpu", "storage_local", "storage_remote", "unknown", "speculative"][self as usize]
    }

    /// The fastest tier of a mask that is not empty.
    pub fn best(mask: u8) -> Self {
        ALL[(mask.trailing_zeros() as usize).min(TIERS - 1)]
    }
}

/// What a block is worth in each tier, between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights(pub [f64; TIERS]);

impl Default for Weights {
    fn default() -> Self {
        Self([1.0, 0.8, 0.4, 0.2, 0.2, 1.0])
    }
}

/// One KV cache group of one engine: what can hold a block. Numbers are used again after an engine
/// is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Column(pub u32);

/// A column with its tiers, in 32 bits: the order of holders is the order of columns.
pub fn pack(column: Column, mask: u8) -> u32 {
    column.0 << 8 | u32::from(mask)
}

/// The parts of a packed holder.
pub fn unpack(holder: u32) -> (Column, u8) {
    (Column(holder >> 8), holder as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_never_gpu_memory() {
        assert_eq!(FleetTier::of(Some("HBM3"), None), FleetTier::Unknown);
        assert_eq!(FleetTier::of(None, None), FleetTier::Gpu);
        assert_eq!(FleetTier::of(Some("STORAGE"), None), FleetTier::StorageRemote);
        assert_eq!(FleetTier::of(Some("STORAGE"), Some("LOCAL")), FleetTier::StorageLocal);
        let weights = Weights::default().0;
        assert!(weights[FleetTier::Unknown as usize] < weights[FleetTier::Cpu as usize]);
    }

    #[test]
    fn names_of_other_publishers_are_known_in_any_case() {
        let of = |medium, locality| FleetTier::of(Some(medium), locality);
        for medium in ["gpu", "Gpu", "HBM", "device"] {
            assert_eq!(of(medium, None), FleetTier::Gpu, "{medium}");
        }
        for medium in ["cpu", "CPU_PINNED", "CPU_TIER1", "DRAM", "host"] {
            assert_eq!(of(medium, None), FleetTier::Cpu, "{medium}");
            assert_eq!(of(medium, Some("REMOTE")), FleetTier::StorageRemote, "{medium}");
        }
        for medium in ["DISK", "disk", "NVMe", "SSD"] {
            assert_eq!(of(medium, None), FleetTier::StorageLocal, "{medium}");
        }
        for medium in ["EXTERNAL", "external", "REMOTE", "storage"] {
            assert_eq!(of(medium, None), FleetTier::StorageRemote, "{medium}");
        }
        assert_eq!(of("storage", Some("local")), FleetTier::StorageLocal);
    }

    #[test]
    fn the_best_tier_is_the_fastest() {
        assert_eq!(FleetTier::best(FleetTier::Cpu.bit() | FleetTier::StorageLocal.bit()), FleetTier::Cpu);
        assert_eq!(unpack(pack(Column(70_000), 0b101)), (Column(70_000), 0b101));
    }
}
