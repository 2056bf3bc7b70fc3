//! The copy orders of one step, as bytes that travel in vLLM's connector metadata from `EngineCore`
//! to the workers.
//!
//! A plan is made by the tier engine and executed by every rank's copy worker. Its bytes are
//! checked when they are read: a length that passes the end, or a count that cannot be, is an error
//! and the worker executes nothing.

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::limits;

const MAGIC: u32 = 0x4c50_434b; // "KCPL" read as little-endian

/// One block to copy between vLLM's KV cache and a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct BlockCopy {
    /// The slot.
    pub slot: u32,
    /// The slot's generation when the order was given.
    pub generation: u32,
    /// vLLM's block id.
    pub block: u32,
    /// The KV cache group.
    pub group: u16,
    /// [`VERIFY`] or nothing.
    pub flags: u16,
}

/// The slot was adopted: compare its checksum before its bytes are used.
pub const VERIFY: u16 = 1;

/// A fence for somebody whose writes the compute stream does not order: wait until the copy has
/// answered.
pub const ANSWERED: u16 = 4;

/// The slot is being restored from disk: copy once its line says that it is filled, in the order of
/// the plan.
pub const FOLLOW: u16 = 2;

/// An asynchronous load for one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Load {
    /// vLLM's request id.
    pub request: String,
    /// The load cannot work (a block was gone when it was planned): report it failed.
    pub doomed: bool,
    /// What to copy into vLLM's KV cache.
    pub copies: Vec<BlockCopy>,
}

/// Everything a worker has to do for one step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Offloads whose source blocks are complete already: start them before the forward pass.
    pub stores_before: Vec<BlockCopy>,
    /// Fences: offloads whose source block this step gives to somebody else. Wait for them before
    /// the forward pass.
    pub waits: Vec<BlockCopy>,
    /// Loads to start.
    pub loads: Vec<Load>,
    /// Offloads of blocks that this step's forward pass completes: start them after it.
    pub stores_after: Vec<BlockCopy>,
}

impl StepPlan {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.stores_before.is_empty() && self.waits.is_empty() && self.loads.is_empty() && self.stores_after.is_empty()
    }

    /// The plan as bytes; nothing at all for an empty plan.
    pub fn encode(&self) -> Vec<u8> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut bytes = Vec::new();
        put_u32(&mut bytes, MAGIC);
        put_copies(&mut bytes, &self.stores_before);
        put_copies(&mut bytes, &self.waits);
        put_copies(&mut bytes, &self.stores_after);
        put_u32(&mut bytes, self.loads.len() as u32);
        for load in &self.loads {
            put_u32(&mut bytes, load.request.len() as u32);
            put_u32(&mut bytes, u32::from(load.doomed));
            bytes.extend_from_slice(load.request.as_bytes());
            put_copies(&mut bytes, &load.copies);
        }
        bytes
    }

    /// Reads a plan back.
    ///
    /// # Errors
    /// [`Error::DataLost`] when the bytes are no whole plan.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut rest = bytes;
        if take_u32(&mut rest)? != MAGIC {
            return Err(damaged("it does not start like a plan"));
        }
        let stores_before = take_copies(&mut rest)?;
        let waits = take_copies(&mut rest)?;
        let stores_after = take_copies(&mut rest)?;
        let count = take_u32(&mut rest)?;
        let mut loads = Vec::new();
        for _ in 0..count {
            loads.push(take_load(&mut rest)?);
        }
        if !rest.is_empty() {
            return Err(damaged("bytes are left over"));
        }
        Ok(Self { stores_before, waits, loads, stores_after })
    }
}

fn damaged(problem: &str) -> Error {
    Error::lost("step plan", problem)
}

fn put_u32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

fn put_copies(bytes: &mut Vec<u8>, copies: &[BlockCopy]) {
    put_u32(bytes, copies.len() as u32);
    bytes.extend_from_slice(bytemuck::cast_slice(copies));
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(len).ok_or_else(|| damaged("it ends early"))?;
    *rest = tail;
    Ok(head)
}

fn take_u32(rest: &mut &[u8]) -> Result<u32> {
    Ok(bytemuck::pod_read_unaligned(take(rest, 4)?))
}

fn take_copies(rest: &mut &[u8]) -> Result<Vec<BlockCopy>> {
    let count = take_u32(rest)? as usize;
    let len = count.checked_mul(size_of::<BlockCopy>()).ok_or_else(|| damaged("a count overflows"))?;
    Ok(take(rest, len)?.chunks_exact(size_of::<BlockCopy>()).map(bytemuck::pod_read_unaligned).collect())
}

fn take_load(rest: &mut &[u8]) -> Result<Load> {
    let id_len = take_u32(rest)? as usize;
    if id_len > limits::REQUEST_ID_BYTES_MAX {
        return Err(damaged("a request id is too long"));
    }
    let doomed = take_u32(rest)? != 0;
    let request =
        std::str::from_utf8(take(rest, id_len)?).map_err(|_| damaged("a request id is not UTF-8"))?.to_owned();
    Ok(Load { request, doomed, copies: take_copies(rest)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(slot: u32) -> BlockCopy {
        BlockCopy { slot, generation: 1, block: slot + 10, group: 2, flags: VERIFY }
    }

    fn sample() -> StepPlan {
        StepPlan {
            stores_before: vec![copy(1)],
            waits: vec![copy(2), copy(3)],
            loads: vec![Load { request: "cmpl-1".to_owned(), doomed: false, copies: vec![copy(4)] }, Load::default()],
            stores_after: vec![copy(5)],
        }
    }

    #[test]
    fn a_plan_survives_the_journey() {
        assert_eq!(StepPlan::decode(&sample().encode()).expect("valid"), sample());
        assert!(StepPlan::default().encode().is_empty());
        assert!(StepPlan::decode(&[]).expect("empty").is_empty());
    }

    #[test]
    fn every_cut_and_surplus_is_refused() {
        let bytes = sample().encode();
        for len in 1..bytes.len() {
            assert!(StepPlan::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        let mut surplus = bytes.clone();
        surplus.push(0);
        assert!(StepPlan::decode(&surplus).is_err());
        let mut hostile = bytes;
        hostile[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(StepPlan::decode(&hostile).is_err());
    }
}
