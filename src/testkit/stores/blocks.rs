//! Blocks by number: what each one's key, lineage and bytes are.

use kvcellar_block::descriptor::{self, Lineage, Seal};
use kvcellar_block::geometry::RankBytes;
use kvcellar_block::{
    BlockHash, BlockKey, Generation, GroupIndex, GroupKind, GroupSpec, Grouping, RankPart, SlotGeometry,
};
use kvcellar_engine::nvme::extent;

/// Two groups on three ranks: 4 KiB of payload. The last rank has no bytes of the first group, and
/// those of the first rank of the second.
pub fn geometry() -> SlotGeometry {
    let group = GroupSpec { kind: GroupKind::Full, kind_name: String::new(), block_tokens: 16, eagle: false };
    let grouping = Grouping { groups: vec![group.clone(), group], hash_tokens: 16, hit_tokens: 16 };
    let own = |first, second| RankBytes { block_bytes: vec![first, second], replica_of: vec![None; 2] };
    let twin = RankBytes { block_bytes: vec![0, 700], replica_of: vec![None, Some(0)] };
    SlotGeometry::lay_out(&grouping, &[own(1500, 700), own(2500, 900), twin]).expect("a geometry")
}

/// The key of block `number`. Odd ones are of the second group.
pub fn key(number: u64) -> BlockKey {
    let mut hash = [0x5a; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    let hash = if number.is_multiple_of(3) { &hash[..16] } else { &hash[..] };
    BlockKey { hash: BlockHash::new(hash).expect("length"), group: GroupIndex((number % 2) as u16) }
}

fn byte(number: u64, at: usize) -> u8 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add((at as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)) >> 29)
        as u8
}

/// A whole extent of block `number`.
pub fn image(number: u64, geometry: &SlotGeometry, store: u64, cache_generation: u64, sequence: u64) -> Vec<u8> {
    let key = key(number);
    let mut image = vec![0; geometry.slot_bytes as usize];
    let (page, payload) = image.split_at_mut(geometry.descriptor_bytes as usize);
    for (at, place) in payload.iter_mut().enumerate() {
        *place = byte(number, at);
    }
    let lineage = Lineage { tokens: (0..16).map(|token| number as u32 ^ token).collect(), ..Lineage::default() };
    assert!(descriptor::write(page, &key, Generation(sequence as u32), geometry.parts.len(), &lineage));
    let sums = extent::sums(&image, geometry, key.group);
    let stored_bytes = geometry.payload_bytes[usize::from(key.group.0)];
    let seal = Seal { store, sequence, cache_generation, written_s: 1000 + sequence, stored_bytes, encoding: 0 };
    descriptor::seal(&mut image[..geometry.descriptor_bytes as usize], &seal, &sums).expect("whole");
    image
}

/// Are all ranks' bytes in this image those of block `number`?
pub fn is_block(image: &[u8], geometry: &SlotGeometry, number: u64) -> bool {
    let payload = &image[geometry.descriptor_bytes as usize..];
    let group = usize::from(key(number).group.0);
    let whole = |part: &RankPart| {
        let (offset, len) = part.spans[group];
        (offset..offset + len).all(|at| payload[at as usize] == byte(number, at as usize))
    };
    geometry.parts.iter().all(whole)
}
