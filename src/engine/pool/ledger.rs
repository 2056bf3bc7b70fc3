//! What all engines of this user have together below one `pool_dir`: the files there are the
//! ledger.
//!
//! A pool that an engine owns, or that processes of a dead one still map, counts with its file's
//! length. What nobody uses is room that a start takes when it needs it, longest out of use first.
//! Read under [`crate::owned::lock::Turn`] only.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::budget::{Bound, Budget, Machine};
use super::registry::{self, Entry};
use crate::owned::listing::Ownership;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;

/// What an engine asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Bytes for this engine.
    pub bytes: u64,
    /// Bytes for all engines together.
    pub total: u64,
    /// The user wrote the size. A default is for each engine: nobody was told that engines share
    /// it.
    pub explicit: bool,
}

/// Who has what, without the file that the asking start took for itself.
#[derive(Debug, Default)]
pub struct Ledger {
    used: Vec<Entry>,
    /// Nobody's, longest out of use first.
    left: Vec<Entry>,
}

/// The room that a start found and made.
#[derive(Debug)]
pub struct Room {
    /// The most it may have, and what bounds that.
    pub most: Budget,
    /// What was removed for it, for the log.
    pub removed: Vec<Entry>,
    /// Bytes of this model's own pool that is given up for another size.
    pub replaced: Option<u64>,
    /// Who has the rest, for people.
    pub holders: String,
}

impl Share {
    /// The most for this engine where others have `in_use`.
    fn most(&self, in_use: u64) -> Budget {
        let left = if self.explicit { self.total.saturating_sub(in_use) } else { u64::MAX };
        if left < self.bytes {
            return Budget { bytes: left, bound: Bound::Engines };
        }
        Budget { bytes: self.bytes, bound: Bound::Configured }
    }

    /// Whether what nobody uses has no place beside what is used and `most`.
    fn is_over(&self, in_use: u64, left: u64, most: u64) -> bool {
        in_use.saturating_add(left).saturating_add(most) > self.total
    }
}

impl Ledger {
    /// Reads the files below `pool_dir`. `own`: the file that the asking start took.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(pool_dir: &Path, own: &Path) -> Result<Self> {
        let entries = registry::list(pool_dir)?.into_iter().filter(|entry| entry.path != own);
        let (used, mut left): (Vec<_>, Vec<_>) = entries.partition(Entry::is_in_use);
        left.sort_by_key(|entry| entry.would_go);
        Ok(Self { used, left })
    }

    fn in_use(&self) -> u64 {
        self.used.iter().map(|entry| entry.file_bytes).sum()
    }

    fn left_bytes(&self) -> u64 {
        self.left.iter().map(|entry| entry.bytes).sum()
    }

    fn is_held(&self) -> bool {
        self.used.iter().any(|entry| entry.state == Ownership::Mapped)
    }

    /// Who has it, for people.
    fn holders(&self) -> String {
        let holder = |entry: &Entry| {
            let pid = entry.owner_pid.map_or("a process".to_owned(), |pid| format!("process {pid}"));
            format!("{pid} has {} ({})", show(entry.file_bytes), entry.name)
        };
        self.used.iter().map(holder).collect::<Vec<_>>().join(", ")
    }
}

/// Finds room for a pool below `pool_dir`, and removes what nobody uses as far as that is needed.
/// `own`: the file that this start took, of which `own_bytes` can be used on. Waits up to
/// `patience` for processes of dead engines to let go.
///
/// # Errors
/// [`Error::Config`] when other engines have all of it, with their names; [`Error::Io`].
pub fn make_room(pool_dir: &Path, share: Share, own: (&Path, u64), least: u64, patience: Duration) -> Result<Room> {
    let (own, own_bytes) = own;
    let deadline = Instant::now() + patience;
    let mut ledger = Ledger::read(pool_dir, own)?;
    while ledger.is_held() && share.most(ledger.in_use()).bound == Bound::Engines && Instant::now() < deadline {
        sleep(Duration::from_millis(50));
        ledger = Ledger::read(pool_dir, own)?;
    }
    let in_use = ledger.in_use();
    let most = share.most(in_use);
    if most.bound == Bound::Engines && most.bytes < least {
        return Err(taken(pool_dir, share, &ledger));
    }
    let mut removed = Vec::new();
    while !ledger.left.is_empty() {
        let fits = Machine::look(pool_dir).budget(most, own_bytes).bytes >= most.bytes;
        if fits && !share.is_over(in_use, ledger.left_bytes(), most.bytes) {
            break;
        }
        let oldest = ledger.left.remove(0);
        match registry::remove(&oldest) {
            Ok(()) => removed.push(oldest),
            // Somebody removed it by hand, or took it outside a turn: it is not ours to give any
            // more.
            Err(Error::TryLater { .. } | Error::Io { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Room { most, removed, replaced: None, holders: ledger.holders() })
}

fn taken(pool_dir: &Path, share: Share, ledger: &Ledger) -> Error {
    Error::config(
        "dram_size",
        format!(
            "all engines of this user below {} get {} together, and {}",
            pool_dir.display(),
            show(share.total),
            ledger.holders()
        ),
        "Write a larger dram_size, stop one of them, or give this engine another pool_dir",
    )
}

/// What was removed, for the log.
pub fn describe_removed(removed: &[Entry]) -> Option<String> {
    if removed.is_empty() {
        return None;
    }
    let name = |entry: &Entry| {
        let model = entry.facts.as_ref().and_then(|facts| facts["model"].as_str()).unwrap_or("unknown model");
        format!("{} ({model}, {})", entry.name, show(entry.bytes))
    };
    let names = removed.iter().map(name).collect::<Vec<_>>().join(", ");
    Some(format!("removed {} leftover pools that no engine uses, for their room: {names}", removed.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: Share = Share { bytes: 40, total: 100, explicit: true };

    #[test]
    fn engines_share_a_written_size() {
        let cases = [(0, 40, Bound::Configured), (60, 40, Bound::Configured), (61, 39, Bound::Engines)];
        for (in_use, bytes, bound) in [(100, 0, Bound::Engines), (500, 0, Bound::Engines)].into_iter().chain(cases) {
            assert_eq!(SHARE.most(in_use), Budget { bytes, bound }, "{in_use} in use");
        }
    }

    #[test]
    fn a_default_is_for_each_engine() {
        let share = Share { explicit: false, ..SHARE };
        assert_eq!(share.most(500), Budget { bytes: 40, bound: Bound::Configured });
    }

    #[test]
    fn leftovers_stay_as_long_as_they_have_a_place() {
        assert!(!SHARE.is_over(30, 30, 40));
        assert!(SHARE.is_over(30, 31, 40));
        assert!(SHARE.is_over(u64::MAX, 1, 40), "no overflow");
    }
}
