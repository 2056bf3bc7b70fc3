//! After a restart: what an earlier engine left in the pool comes back, if it can prove what it is.

use super::residency::Residency;
use kvcellar_block::{Generation, SaltTag, SlotIndex};

/// Takes over every whole block of the present generation that has all its checksums, and empties
/// all other slots. Returns how many came back.
///
/// The bytes are compared with the checksums by the workers, before the first load that uses them.
pub fn take_over(residency: &mut Residency, adopt: bool) -> u64 {
    let memory = residency.memory().clone();
    for slot in (0..memory.slot_count()).map(SlotIndex) {
        let left = if adopt { memory.left_behind(slot) } else { None };
        match left {
            // The same block twice can only be damage: the first one stays.
            Some((key, generation, lineage)) if residency.find(&key).is_none() => {
                residency.adopt(slot, &key, generation, lineage);
            }
            _ => {
                let line = memory.line(slot);
                if line.remains().1 != Generation(0) {
                    // A slot that was used once may hold anybody's bytes.
                    residency.remains.set(slot, SaltTag::UNKNOWN);
                }
                line.clear();
            }
        }
    }
    residency.recount_free();
    residency.counters.adopted_blocks
}
