//! Copies between vLLM's KV cache and the host pool, for one rank.
//!
//! Owns: the addresses of vLLM's KV tensors, the threads or streams that copy, and the order in
//! which a step's copies may start. Promises: a copy is submitted, never waited for (except for a
//! fence, which vLLM's next forward pass depends on); every order is answered exactly once, also a
//! failed one. Decides nothing about blocks.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod follower;
pub mod fragments;
pub mod hasher;
pub mod host;
pub mod sides;
pub mod views;
pub mod worker;

use std::any::Any;
use std::sync::Arc;

use kvcellar_block::error::Result;
use kvcellar_block::plan::BlockCopy;

/// Which way a block goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// KV cache to slot.
    Offload,
    /// Slot to KV cache.
    Load,
}

/// One block on its way, with the number its submitter gave it.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// What to copy.
    pub copy: BlockCopy,
    /// Which way.
    pub direction: Direction,
    /// The submitter's ticket, handed back with the answer.
    pub ticket: u64,
}

/// Why a block was not copied. Its destination may hold anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The slot belongs to somebody else by now.
    #[error("the slot's generation is over")]
    Stale,
    /// The order names a block, group or slot that does not exist.
    #[error("the order passes the end of the KV cache or of the pool")]
    OutOfRange,
    /// The bytes are not the ones that were stored.
    #[error("the bytes do not match their checksum")]
    Mismatch,
    /// The block could not be restored from disk.
    #[error("the block could not be restored from disk")]
    NotRestored,
    /// The device refused.
    #[error("the device failed")]
    Device,
}

/// The stream on which vLLM computes, by its handle; 0 is the device's default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComputeStream(pub u64);

/// A place in the compute stream's order, that copies come after. Made by [`Copier::mark`]; what it
/// holds is the copier's own business. The default one comes after nothing.
#[derive(Clone, Default)]
pub struct After(
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "in host memory there is nothing to come after"))]
    pub(crate) Option<Arc<dyn Any + Send + Sync>>,
);

/// Where answers go. Called from the copier's own threads.
pub trait Answers: Send + Sync {
    /// One order was carried out, or could not be. Called exactly once for every submitted order.
    fn answer(&self, order: &Order, outcome: std::result::Result<(), CopyError>);
}

/// Moves blocks. Implementations: the host's threads ([`host::HostCopier`]) and, on a GPU, streams
/// (`cuda::copier`).
///
/// The memory of both sides stays alive and in place until every submitted order was answered: the
/// copier keeps the pool mapped, and vLLM keeps its KV cache until the connector is shut down.
pub trait Copier: Send + Sync {
    /// Starts copies, when all before `after` is done. Loads overtake offloads that have not
    /// started. Returns at once.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when nothing can be started any more; no order
    /// was taken then.
    fn submit(&self, orders: &[Order], after: &After) -> Result<()>;

    /// Orders that were submitted and not answered yet.
    fn in_flight(&self) -> usize;

    /// The place after everything the compute stream was given until now. Returns at once.
    ///
    /// In host memory there is nothing to do: what was computed before the call is there.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`] when the copier cannot follow the stream: what
    /// should come after that place must not be submitted.
    fn mark(&self, _compute: Option<ComputeStream>) -> Result<After> {
        Ok(After::default())
    }

    /// Makes the compute stream, not the caller, wait until these offloads have read their blocks.
    /// `false`: it will not, and the caller has to wait for their answers.
    fn fence(&self, _compute: Option<ComputeStream>, _offloads: &[BlockCopy]) -> bool {
        false
    }

    /// What people should know of this copier, once: what it found, what it could not get, and what
    /// to raise.
    fn take_notes(&self) -> Vec<String> {
        Vec::new()
    }
}
