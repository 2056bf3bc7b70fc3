//! Python objects into plain data, with the GIL held, before the work starts.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use kvcellar_block::{AdapterId, BlockHash};
use kvcellar_engine::tier::offload::GroupOffer;

/// Block hashes as vLLM hands them out.
pub(super) fn hashes(list: &Bound<'_, PyList>) -> PyResult<Vec<BlockHash>> {
    let mut hashes = Vec::with_capacity(list.len());
    for item in list.iter() {
        let bytes = item.cast::<PyBytes>()?.as_bytes();
        let hash = BlockHash::new(bytes)
            .ok_or_else(|| PyValueError::new_err(format!("a block hash has 16 or 32 bytes, not {}", bytes.len())))?;
        hashes.push(hash);
    }
    Ok(hashes)
}

/// What a request without an adapter gives.
pub(super) const NO_ADAPTER: &[u8] = &[];

/// What a request without a salt gives.
pub(super) const NO_SALT: &[u8] = &[];

/// An adapter's digest; nothing for none.
pub(super) fn adapter(digest: &[u8]) -> PyResult<Option<AdapterId>> {
    match AdapterId::new(digest) {
        Some(adapter) => Ok(Some(adapter)),
        None if digest.is_empty() => Ok(None),
        None => Err(PyValueError::new_err(format!("an adapter's digest has 16 bytes, not {}", digest.len()))),
    }
}

/// One group's part of an offer: first block, block ids, encoded extra keys.
pub(super) type PyGroupOffer = (u32, Vec<u32>, Vec<Vec<u8>>);

/// One request's offer: id, new block hashes, first token, tokens, groups.
pub(super) type PyOffer<'py> = (String, Bound<'py, PyList>, u32, Vec<u32>, Vec<PyGroupOffer>);

/// An offer that owns everything.
pub(super) struct OwnedOffer {
    pub(super) request: String,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) tokens_from: u32,
    pub(super) tokens: Vec<u32>,
    pub(super) groups: Vec<GroupOffer>,
}

pub(super) fn offer(given: PyOffer<'_>) -> PyResult<OwnedOffer> {
    let (request, new_hashes, tokens_from, tokens, groups) = given;
    let groups = groups.into_iter().map(|(first, blocks, extra)| GroupOffer {
        first,
        blocks,
        extra: extra.into_iter().map(Vec::into_boxed_slice).collect(),
    });
    Ok(OwnedOffer { request, hashes: hashes(&new_hashes)?, tokens_from, tokens, groups: groups.collect() })
}
