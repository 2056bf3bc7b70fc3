//! The table: request key to holder set. Readers never wait; one writer changes it.
//!
//! Sixteen open-addressing tables of atomic cells. A cell's key is emptied before its value changes
//! and written after it, so that a reader who finds the same key before and after reading the value
//! has a value of that key. Removed cells stay marked until their table is made anew, which readers
//! see as one exchange of a pointer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use super::sets::SetRef;
use kvcellar_block::prefetch;

const SHARD_BITS: u32 = 4;
const SHARDS: usize = 1 << SHARD_BITS;
const CELLS_MIN: usize = 256;

const EMPTY: u64 = 0;
const GONE: u64 = 1;

#[derive(Debug, Default)]
struct Cell {
    key: AtomicU64,
    value: AtomicU64,
}

#[derive(Debug)]
struct Cells(Box<[Cell]>);

impl Cells {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| Cell::default()).collect())
    }

    fn at(&self, key: u64) -> usize {
        key as usize & (self.0.len() - 1)
    }

    fn get(&self, key: u64) -> Option<SetRef> {
        let mask = self.0.len() - 1;
        let mut at = self.at(key);
        // As many steps as there are cells: a full table must not make a reader run for ever.
        for _ in 0..=mask {
            let cell = &self.0[at];
            match cell.key.load(Ordering::Acquire) {
                EMPTY => return None,
                found if found == key => {
                    let value = cell.value.load(Ordering::Acquire);
                    // Else the block was removed at this moment, and another one may have the cell
                    // by now.
                    return (cell.key.load(Ordering::Acquire) == key).then_some(SetRef(value));
                }
                _ => at = (at + 1) & mask,
            }
        }
        None
    }
}

/// What readers see.
#[derive(Debug)]
pub struct HolderTable {
    shards: [ArcSwap<Cells>; SHARDS],
}

fn shard_of(key: u64) -> usize {
    (key >> (u64::BITS - SHARD_BITS)) as usize
}

/// A reader's hold on the table. It sees later changes, except that a table made anew is noticed by
/// [`TableView::renew`] only.
#[derive(Debug)]
pub struct TableView<'t> {
    table: &'t HolderTable,
    held: [Option<Arc<Cells>>; SHARDS],
}

impl HolderTable {
    /// Begins to read.
    pub fn view(&self) -> TableView<'_> {
        TableView { table: self, held: [const { None }; SHARDS] }
    }
}

impl TableView<'_> {
    fn cells(&mut self, key: u64) -> &Cells {
        let shard = shard_of(key);
        self.held[shard].get_or_insert_with(|| self.table.shards[shard].load_full())
    }

    /// Who holds a block, if anybody does.
    #[inline]
    pub fn get(&mut self, key: u64) -> Option<SetRef> {
        self.cells(key).get(key)
    }

    /// Says that a block will be asked for soon.
    #[inline]
    pub fn announce(&mut self, key: u64) {
        let cells = self.cells(key);
        prefetch(&cells.0[cells.at(key)]);
    }

    /// Looks at the newest table of this block from now on.
    pub fn renew(&mut self, key: u64) {
        self.held[shard_of(key)] = None;
    }
}

#[derive(Debug)]
struct TableShard {
    cells: Arc<Cells>,
    used: usize,
    gone: usize,
}

/// The writer's side.
#[derive(Debug)]
pub struct TableWriter {
    table: Arc<HolderTable>,
    shards: [TableShard; SHARDS],
}

/// Where a key is, or would go.
#[derive(Debug, Clone, Copy)]
pub struct TableSpot {
    shard: usize,
    at: usize,
    /// The set that is there.
    pub found: Option<SetRef>,
}

impl TableWriter {
    /// Empty.
    pub fn new() -> Self {
        let shards: [TableShard; SHARDS] =
            std::array::from_fn(|_| TableShard { cells: Arc::new(Cells::new(CELLS_MIN)), used: 0, gone: 0 });
        let table = Arc::new(HolderTable {
            shards: std::array::from_fn(|shard| ArcSwap::new(Arc::clone(&shards[shard].cells))),
        });
        Self { table, shards }
    }

    /// What readers need.
    pub fn shared(&self) -> Arc<HolderTable> {
        Arc::clone(&self.table)
    }

    /// Blocks with a holder.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.used).sum()
    }

    /// No block has a holder.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the cells.
    pub fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.cells.0.len() * size_of::<Cell>()).sum()
    }

    /// Bytes that one more block may cost at this moment: those of a larger table, beside the
    /// present one while its cells move.
    pub fn growth(&self, key: u64) -> usize {
        let shard = &self.shards[shard_of(key)];
        if shard.is_full() { shard.next_size() * size_of::<Cell>() } else { 0 }
    }

    /// Says that a block will be changed soon.
    #[inline]
    pub fn announce(&self, key: u64) {
        let cells = &self.shards[shard_of(key)].cells;
        prefetch(&cells.0[cells.at(key)]);
    }

    /// Finds a key.
    #[inline]
    pub fn spot(&self, key: u64) -> TableSpot {
        let shard = shard_of(key);
        let cells = &self.shards[shard].cells;
        let mask = cells.0.len() - 1;
        let mut at = cells.at(key);
        let mut free = None;
        loop {
            match cells.0[at].key.load(Ordering::Relaxed) {
                EMPTY => return TableSpot { shard, at: free.unwrap_or(at), found: None },
                GONE => free = free.or(Some(at)),
                found if found == key => {
                    return TableSpot { shard, at, found: Some(SetRef(cells.0[at].value.load(Ordering::Relaxed))) };
                }
                _ => {}
            }
            at = (at + 1) & mask;
        }
    }

    /// Writes the set of a key whose spot was found just now; [`SetRef::NONE`] removes it.
    #[inline]
    pub fn put(&mut self, key: u64, spot: TableSpot, value: SetRef) {
        let shard = &mut self.shards[spot.shard];
        let cell = &shard.cells.0[spot.at];
        match (spot.found, value) {
            (None, SetRef::NONE) => {}
            (Some(_), SetRef::NONE) => {
                cell.key.store(GONE, Ordering::Release);
                shard.used -= 1;
                shard.gone += 1;
            }
            (Some(_), _) => cell.value.store(value.0, Ordering::Release),
            (None, _) => {
                shard.gone -= usize::from(cell.key.load(Ordering::Relaxed) == GONE);
                cell.value.store(value.0, Ordering::Release);
                cell.key.store(key, Ordering::Release);
                shard.used += 1;
                if shard.is_full() {
                    let size = shard.next_size();
                    shard.rebuild(size);
                    self.table.shards[spot.shard].store(Arc::clone(&self.shards[spot.shard].cells));
                }
            }
        }
    }
}

impl Default for TableWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl TableShard {
    /// Probes stay short up to this share of cells in use or marked.
    fn is_full(&self) -> bool {
        (self.used + self.gone + 1) * 10 > self.cells.0.len() * 7
    }

    fn next_size(&self) -> usize {
        let cells = self.cells.0.len();
        if self.used * 10 > cells * 4 { cells * 2 } else { cells }
    }

    fn rebuild(&mut self, size: usize) {
        let fresh = Cells::new(size);
        for cell in &self.cells.0 {
            let key = cell.key.load(Ordering::Relaxed);
            if key > GONE {
                let mut at = fresh.at(key);
                while fresh.0[at].key.load(Ordering::Relaxed) != EMPTY {
                    at = (at + 1) & (size - 1);
                }
                fresh.0[at].value.store(cell.value.load(Ordering::Relaxed), Ordering::Relaxed);
                fresh.0[at].key.store(key, Ordering::Relaxed);
            }
        }
        self.gone = 0;
        self.cells = Arc::new(fresh);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use xxhash_rust::xxh3::xxh3_64;

    fn key(number: u64) -> u64 {
        xxh3_64(&number.to_le_bytes()).max(2)
    }

    fn put(writer: &mut TableWriter, key: u64, value: u64) {
        let spot = writer.spot(key);
        writer.put(key, spot, SetRef(value));
    }

    #[test]
    fn it_is_a_map() {
        let mut writer = TableWriter::new();
        let mut model = HashMap::new();
        for step in 0..200_000_u64 {
            let number = xxh3_64(&step.to_le_bytes()) % 20_000;
            if step % 3 == 0 {
                put(&mut writer, key(number), 0);
                model.remove(&number);
            } else {
                put(&mut writer, key(number), step + 1);
                model.insert(number, step + 1);
            }
        }
        let table = writer.shared();
        let mut view = table.view();
        assert_eq!(writer.len(), model.len());
        for number in 0..20_000 {
            assert_eq!(view.get(key(number)), model.get(&number).map(|value| SetRef(*value)), "{number}");
        }
        // Marked cells are cleared away: the table does not grow by traffic alone.
        assert!(writer.bytes() < 3 * 20_000 * 16 * 2);
    }

    #[test]
    fn readers_beside_a_writer_see_values_of_their_own_key() {
        let mut writer = TableWriter::new();
        let table = writer.shared();
        let done = std::sync::atomic::AtomicBool::new(false);
        put(&mut writer, key(1000), 1);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut hits = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    let mut view = table.view();
                    for number in 0..64 {
                        // Values carry their key's number in the low bits.
                        if let Some(SetRef(value)) = view.get(key(number)) {
                            assert_eq!(value & 63, number);
                            hits += 1;
                        }
                        assert!(view.get(key(1000)).is_some(), "a block that stays is always found");
                    }
                }
                hits
            });
            for step in 1..400_000_u64 {
                let number = xxh3_64(&step.to_le_bytes()) % 64;
                put(&mut writer, key(number), if step % 2 == 0 { 0 } else { step << 6 | number });
                put(&mut writer, key(2000 + step % 5000), step % 3);
            }
            done.store(true, Ordering::Relaxed);
            assert!(reader.join().expect("no panic") > 0);
        });
    }
}
