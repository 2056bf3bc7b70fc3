//! An extent's bytes: what must be true of them before anyone uses them.
//!
//! An extent is the image of a pool slot: descriptor pages with their seal, then the payload.
//! Promises: [`check`] and [`check_into`] let nothing through that is not, bit for bit, what was
//! sealed under the key that they return.

use std::ops::Range;

use crate::checksum::{self, Sum};
use kvcellar_block::descriptor;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{BlockKey, GroupIndex, RankPart, SlotGeometry};

/// What an extent has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The store's id.
    pub store: u64,
    /// The store's present generation of contents.
    pub cache_generation: u64,
    /// The block that should lie there; `None` accepts any.
    pub key: Option<BlockKey>,
}

/// The checksums that seal an image: one a rank over its part of the group's payload, 0 for ranks
/// that write none.
///
/// `image` is a whole slot of this geometry, and `group` one of its groups.
pub fn sums(image: &[u8], geometry: &SlotGeometry, group: GroupIndex) -> Vec<u64> {
    let sum = |part: &RankPart| if part.writes(group) { checksum::of(share(image, geometry, part, group)) } else { 0 };
    geometry.parts.iter().map(sum).collect()
}

/// Copies the payload of an image of a block of `group` into another image, and sums it meanwhile:
/// the same as [`sums`] of what was copied. Descriptor pages are left alone.
pub fn copy_payload(image: &[u8], into: &mut [u8], geometry: &SlotGeometry, group: GroupIndex) -> Vec<u64> {
    let mut copy = |part: &RankPart| {
        if !part.writes(group) {
            return 0;
        }
        let (from, range) = (share(image, geometry, part, group), place(geometry, part, group));
        let mut sum = Sum::new(from.len());
        sum.copy_slice(&mut into[range], from);
        sum.finish()
    };
    geometry.parts.iter().map(&mut copy).collect()
}

/// What each rank that writes one has put into an image of a block of `group`.
pub fn parts<'a>(image: &'a [u8], geometry: &'a SlotGeometry, group: GroupIndex) -> impl Iterator<Item = &'a [u8]> {
    geometry.parts.iter().filter(move |part| part.writes(group)).map(move |part| share(image, geometry, part, group))
}

fn share<'a>(image: &'a [u8], geometry: &SlotGeometry, part: &RankPart, group: GroupIndex) -> &'a [u8] {
    &image[place(geometry, part, group)]
}

/// Where a rank's part of a block lies in an image.
fn place(geometry: &SlotGeometry, part: &RankPart, group: GroupIndex) -> Range<usize> {
    let (offset, len) = part.spans[usize::from(group.0)];
    let start = (geometry.descriptor_bytes + offset) as usize;
    start..start + len as usize
}

/// Checks the image that was read from an extent: it is of this store and generation, it is the
/// expected block, and all its bytes are whole.
///
/// # Errors
/// [`Error::DataLost`] saying what is wrong.
pub fn check(image: &[u8], geometry: &SlotGeometry, expected: &Expected) -> Result<BlockKey> {
    let (key, sealed) = check_descriptor(image, geometry, expected)?;
    compare(&sums(image, geometry, key.group), &sealed)?;
    Ok(key)
}

/// As [`check`], while the image is copied to `into`, another whole slot: one pass over the bytes.
/// After an error `into` holds anything.
///
/// # Errors
/// As [`check`].
pub fn check_into(image: &[u8], into: &mut [u8], geometry: &SlotGeometry, expected: &Expected) -> Result<BlockKey> {
    let (key, sealed) = check_descriptor(image, geometry, expected)?;
    let pages = geometry.descriptor_bytes as usize;
    into[..pages].copy_from_slice(&image[..pages]);
    compare(&copy_payload(image, into, geometry, key.group), &sealed)?;
    Ok(key)
}

/// All but the payload: the block's key, and the checksums that its payload must have.
fn check_descriptor(image: &[u8], geometry: &SlotGeometry, expected: &Expected) -> Result<(BlockKey, Vec<u64>)> {
    let wrong = |problem: String| Error::lost("extent", problem);
    if image.len() as u64 != geometry.slot_bytes {
        return Err(wrong(format!("{} bytes instead of {}", image.len(), geometry.slot_bytes)));
    }
    let page = &image[..geometry.descriptor_bytes as usize];
    let (key, seal, sealed) = descriptor::unseal(page, geometry.parts.len())?;
    if seal.store != expected.store {
        return Err(wrong(format!("it belongs to store {:016x}", seal.store)));
    }
    if seal.cache_generation != expected.cache_generation {
        return Err(wrong(format!("it is of generation {}, not {}", seal.cache_generation, expected.cache_generation)));
    }
    if let Some(wanted) = expected.key.filter(|wanted| *wanted != key) {
        return Err(wrong(format!("it holds block {key}, not {wanted}")));
    }
    let Some(bytes) = geometry.payload_bytes.get(usize::from(key.group.0)) else {
        return Err(wrong(format!("there is no group {}", key.group.0)));
    };
    if seal.encoding != 0 || seal.stored_bytes != *bytes {
        return Err(wrong(format!("encoding {} of {} bytes", seal.encoding, seal.stored_bytes)));
    }
    Ok((key, sealed))
}

#[cfg(not(feature = "mutant-unchecked"))]
fn compare(found: &[u64], sealed: &[u64]) -> Result<()> {
    match found.iter().zip(sealed).position(|(found, sealed)| found != sealed) {
        None => Ok(()),
        Some(rank) => Err(Error::lost("extent", format!("the checksum of rank {rank}'s part does not match"))),
    }
}

/// The mutant that the tests must notice: payloads are believed.
#[cfg(feature = "mutant-unchecked")]
#[expect(clippy::unnecessary_wraps, reason = "stands in for the real one")]
fn compare(_found: &[u64], _sealed: &[u64]) -> Result<()> {
    Ok(())
}
