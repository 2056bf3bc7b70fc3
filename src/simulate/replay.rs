//! One workload through one pair of tiers.

use serde::{Serialize, Serializer};

use super::account::{Account, Summary, Totals};
use super::clairvoyant;
use super::trace::WorkloadSource;
use kvcellar_block::error::Result;
use kvcellar_block::{BlockHash, SaltTag};
use kvcellar_engine::config::TenantList;
use kvcellar_engine::config::nvme::WriteRate;
use kvcellar_engine::policy::{Admission, LoadPolicy, PolicyName};
use kvcellar_engine::tier::replay::{ReplaySettings, TierReplay};

/// Who keeps blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeper {
    /// Our tiers with this policy.
    Policy(PolicyName),
    /// A cache of the same size that knows the future.
    Belady,
    /// A cache that keeps everything.
    Infinite,
}

impl Keeper {
    /// All policies and both bounds.
    pub fn all() -> Vec<Self> {
        PolicyName::ALL.into_iter().map(Self::Policy).chain([Self::Belady, Self::Infinite]).collect()
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Policy(policy) => policy.name(),
            Self::Belady => "belady",
            Self::Infinite => "infinite",
        }
    }
}

impl Serialize for Keeper {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Sizes of both tiers, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Of the dram tier, at least 1.
    pub dram_blocks: u32,
    /// Of the nvme tier; 0: there is none.
    pub nvme_blocks: u32,
}

/// What one keeper made of the workload.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Who kept blocks.
    pub keeper: Keeper,
    /// The result.
    #[serde(flatten)]
    pub summary: Summary,
}

/// What the user decided about the tiers beside their policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Choices {
    /// Which blocks are written to disk.
    pub admission: Admission,
    /// Whether what lies on disk is loaded or computed.
    pub load_policy: LoadPolicy,
    /// Share of the slots, in percent, kept free or clean.
    pub clean_percent: u64,
    /// Bytes that may be written to disk in a time; `None`: no bound.
    pub write_budget: Option<WriteRate>,
    /// Who shares the tiers.
    pub tenants: TenantList,
}

/// The block hash that stands for a trace's id.
pub(super) fn hash(id: u64) -> BlockHash {
    let mut bytes = [0; 32];
    let mut state = id;
    for part in bytes.chunks_exact_mut(8) {
        // SplitMix64: every id gives other bytes, evenly spread.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        part.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    // 32 bytes are a length every hash may have.
    BlockHash::new(&bytes).unwrap_or_else(|| unreachable!("32 bytes"))
}

/// Serves a workload.
///
/// # Errors
/// Those of the source.
pub fn replay(
    source: &WorkloadSource,
    account: &Account,
    keeper: Keeper,
    sizes: Sizes,
    choices: &Choices,
) -> Result<Totals> {
    let policy = match keeper {
        Keeper::Policy(policy) => policy,
        Keeper::Belady => {
            let blocks = u64::from(sizes.dram_blocks) + u64::from(sizes.nvme_blocks);
            return clairvoyant::replay(source, account, Some(blocks));
        }
        Keeper::Infinite => return clairvoyant::replay(source, account, None),
    };
    let settings = ReplaySettings {
        slots: sizes.dram_blocks,
        extents: sizes.nvme_blocks,
        block_tokens: account.block_tokens,
        block_bytes: account.block_bytes,
        policy,
        admission: choices.admission,
        load_policy: choices.load_policy,
        rates: account.device.rates(),
        clean_percent: choices.clean_percent,
        write_budget: choices.write_budget,
    };
    let mut tiers = TierReplay::shared(settings, &choices.tenants);
    let mut totals = Totals::default();
    let mut hashes = Vec::new();
    source.each(&mut |request| {
        hashes.clear();
        hashes.extend(request.blocks.iter().map(|id| hash(*id)));
        let owner = choices.tenants.owner(request.tenant.as_deref(), SaltTag::NONE);
        tiers.set_time(request.at_ms as f64 / 1e3);
        let served = tiers.serve_for(owner, &hashes, request.prompt_tokens);
        account.add(&mut totals, request, served.dram, served.nvme);
        totals.stored += u64::from(served.stored);
        totals.written += u64::from(served.written);
        Ok(())
    })?;
    Ok(totals)
}
