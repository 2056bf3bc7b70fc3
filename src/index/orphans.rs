//! Blocks whose parent is not known yet: kept until it comes, up to a bound.
//!
//! Dropping them at once would lose their whole subtree for good, for an engine tells of a block's
//! tokens once. At the bound the oldest go, are counted, and stay misses.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::tiers::Column;
use crate::limits;

/// A block that waits for its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// Its hash.
    pub hash: u64,
    /// Its tokens.
    pub tokens: Box<[u32]>,
    /// Digest of its extra keys.
    pub extra: u64,
    number: u64,
}

/// All orphans, by column and parent.
#[derive(Debug, Default)]
pub struct Orphans {
    waiting: HashMap<(Column, u64), Vec<Orphan>>,
    order: VecDeque<(Column, u64, u64)>,
    count: usize,
    bytes: usize,
    next: u64,
}

fn cost(tokens: usize) -> usize {
    // The block, its list and its place in the order.
    size_of::<Orphan>() + tokens * 4 + 96
}

impl Orphans {
    /// Keeps a block. Returns how many had to go.
    pub fn keep(&mut self, column: Column, parent: u64, hash: u64, tokens: &[u32], extra: u64) -> usize {
        let list = self.waiting.entry((column, parent)).or_default();
        if list.iter().any(|orphan| orphan.hash == hash) {
            return 0;
        }
        self.next += 1;
        list.push(Orphan { hash, tokens: tokens.into(), extra, number: self.next });
        self.order.push_back((column, parent, self.next));
        self.count += 1;
        self.bytes += cost(tokens.len());
        let mut gone = 0;
        while self.bytes > limits::ORPHAN_BYTES_MAX {
            gone += usize::from(self.drop_oldest());
        }
        // Places of adopted ones are passed over when their turn comes; they must not pile up
        // meanwhile.
        if self.order.len() > 2 * self.count + 1024 {
            let waiting = &self.waiting;
            self.order.retain(|(column, parent, number)| {
                waiting.get(&(*column, *parent)).is_some_and(|list| list.iter().any(|it| it.number == *number))
            });
        }
        gone
    }

    fn drop_oldest(&mut self) -> bool {
        let Some((column, parent, number)) = self.order.pop_front() else {
            self.bytes = 0;
            return false;
        };
        let Some(list) = self.waiting.get_mut(&(column, parent)) else { return false };
        let Some(at) = list.iter().position(|orphan| orphan.number == number) else { return false };
        let orphan = list.remove(at);
        if list.is_empty() {
            self.waiting.remove(&(column, parent));
        }
        self.count -= 1;
        self.bytes -= cost(orphan.tokens.len());
        true
    }

    /// Takes the children of a block that has become known.
    pub fn take(&mut self, column: Column, parent: u64) -> Vec<Orphan> {
        if self.count == 0 {
            return Vec::new();
        }
        let taken = self.waiting.remove(&(column, parent)).unwrap_or_default();
        self.count -= taken.len();
        self.bytes -= taken.iter().map(|orphan| cost(orphan.tokens.len())).sum::<usize>();
        taken
    }

    /// Some wait in this column.
    pub fn any(&self, column: Column) -> bool {
        self.count > 0 && self.waiting.keys().any(|(of, _)| *of == column)
    }

    /// Forgets those of a column.
    pub fn clear(&mut self, column: Column) {
        if self.count == 0 {
            return;
        }
        let (mut count, mut bytes) = (0, 0);
        self.waiting.retain(|(of, _), list| {
            if *of == column {
                count += list.len();
                bytes += list.iter().map(|orphan| cost(orphan.tokens.len())).sum::<usize>();
            }
            *of != column
        });
        self.count -= count;
        self.bytes -= bytes;
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.count
    }

    /// None waits.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of those that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_wait_for_their_parent_and_the_oldest_go_first() {
        let mut orphans = Orphans::default();
        assert_eq!(orphans.keep(Column(1), 5, 6, &[1, 2], 0), 0);
        assert_eq!(orphans.keep(Column(1), 5, 6, &[1, 2], 0), 0, "the same block once more");
        orphans.keep(Column(2), 5, 6, &[1, 2], 0);
        assert_eq!(orphans.take(Column(1), 5).len(), 1);
        assert_eq!((orphans.len(), orphans.take(Column(1), 5).len()), (1, 0));
        let tokens = vec![0; 1 << 16];
        let gone: usize = (0..2000).map(|hash| orphans.keep(Column(1), hash, hash, &tokens, 0)).sum();
        assert!(gone > 0 && orphans.bytes() <= limits::ORPHAN_BYTES_MAX);
        assert!(orphans.take(Column(2), 5).is_empty(), "the oldest has gone");
        orphans.clear(Column(1));
        assert_eq!((orphans.len(), orphans.bytes()), (0, 0));
    }
}
