//! Damaged pool files: opening them always works, and nothing that was not stored ever comes back.

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, OnceLock};

use kvcellar_engine::limits::HEADER_BYTES;
use proptest::prelude::*;

use crate::place::{Place, Purpose};
use crate::stock::{Stock, is_whole, left_behind, verifies};

/// Blocks that were stored at some time, whether or not they are still there.
const STORED: std::ops::Range<u64> = 0..8;

/// No block was adopted.
const NONE: [u64; 0] = [];

fn purpose() -> Purpose {
    Purpose::of(6, 2, 500)
}

/// A pool file in the middle of its life: blocks with and without checksums, an evicted one, one
/// that is being filled, an empty slot.
fn sound() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        // Without `Place::new`: whoever asks first has a place of its own already.
        let place = Place::unguarded();
        let mut stock = Stock::of(place.open(&purpose()));
        stock.store(&[0, 1, 2], |number| number != 1);
        stock.store(&[3], |_| true);
        stock.store(&[4], |_| true);
        stock.store(&[5], |_| true);
        // Evicts.
        stock.store(&[6], |_| true);
        let (copy, number) = stock.offer(&[7])[0];
        crate::stock::write(&stock.pool(), &copy, number, 0);
        let path = stock.pool().path().to_owned();
        let found = left_behind(&stock.pool());
        assert!(found.len() >= 3, "{found:?}");
        drop(stock);
        fs::read(path).expect("read")
    })
}

#[derive(Debug, Clone)]
enum Damage {
    Flip {
        at: usize,
        bit: u8,
    },
    Byte {
        at: usize,
        value: u8,
    },
    Zeros {
        at: usize,
        len: usize,
    },
    Noise {
        at: usize,
        bytes: Vec<u8>,
    },
    /// One slot's or page's bytes in the place of another's.
    Copy {
        from: usize,
        to: usize,
        len: usize,
    },
}

impl Damage {
    fn apply(&self, file: &mut [u8]) {
        let end = file.len();
        let range = |at: usize, len: usize| at.min(end)..(at + len).min(end);
        match self {
            Self::Flip { at, bit } => file[at % sound().len()] ^= 1 << bit,
            Self::Byte { at, value } => file[at % sound().len()] = *value,
            Self::Zeros { at, len } => file[range(*at, *len)].fill(0),
            Self::Noise { at, bytes } => {
                let range = range(*at, bytes.len());
                let len = range.len();
                file[range].copy_from_slice(&bytes[..len]);
            }
            Self::Copy { from, to, len } => {
                let (from, to) = (range(*from, *len), range(*to, *len));
                let len = from.len().min(to.len());
                file.copy_within(from.start..from.start + len, to.start);
            }
        }
    }
}

/// Offsets, mostly where they matter: purpose, owner, slot table, descriptors, payload.
fn place() -> impl Strategy<Value = usize> {
    let header = HEADER_BYTES as usize;
    let geometry = purpose().geometry;
    let (slots, slot) = (sound().len() - 6 * geometry.slot_bytes as usize, geometry.slot_bytes as usize);
    prop_oneof![
        2 => 0..128_usize,
        2 => 1024..1056_usize,
        4 => header..header + 6 * 64,
        6 => (0..6_usize, 0..300_usize).prop_map(move |(number, at)| slots + number * slot + at),
        2 => (0..6_usize, 0..1000_usize).prop_map(move |(number, at)| slots + number * slot + geometry.descriptor_bytes as usize + at),
        1 => 0..sound().len(),
    ]
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        8 => (place(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        4 => (place(), any::<u8>()).prop_map(|(at, value)| Damage::Byte { at, value }),
        2 => (place(), 1..9000_usize).prop_map(|(at, len)| Damage::Zeros { at, len }),
        2 => (place(), prop::collection::vec(any::<u8>(), 1..400)).prop_map(|(at, bytes)| Damage::Noise { at, bytes }),
        2 => (place(), place(), 1..9000_usize).prop_map(|(from, to, len)| Damage::Copy { from, to, len }),
    ]
}

/// Puts a file in the place of a pool, opens it, and checks everything that comes back.
fn check(bytes: &[u8]) -> Result<Vec<u64>, TestCaseError> {
    let place = Place::new();
    let purpose = purpose();
    drop(place.open(&purpose));
    let file = purpose.file(place.path(), 0);
    fs::write(&file, bytes).expect("written");
    fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("set");
    let listed = kvcellar_engine::pool::registry::list(place.path()).expect("listed");
    prop_assert_eq!(listed.len(), 1);
    let opened = purpose.open(place.path()).expect("a damaged pool never keeps an engine from starting");
    prop_assert_eq!(opened.pool.slot_count(), 6);
    let adopted = opened.adopted;
    let mut stock = Stock::of(opened);
    let pool: Arc<_> = stock.pool();
    let found = left_behind(&pool);
    prop_assert_eq!(found.len() as u64, stock.adopted);
    prop_assert!(adopted || found.is_empty());
    for block in &found {
        prop_assert!(STORED.contains(&block.number), "{:?} was never stored", block);
        prop_assert!(is_whole(&pool, *block) || !verifies(&pool, *block), "{:?} would be used with wrong bytes", block);
    }
    let numbers: HashSet<u64> = found.iter().map(|found| found.number).collect();
    for number in STORED {
        prop_assert_eq!(stock.hit(&[number]) == 16, numbers.contains(&number), "block {}", number);
    }
    // The pool works: all slots can be filled.
    stock.store(&(100..106).collect::<Vec<_>>(), |_| true);
    prop_assert_eq!(stock.hit(&(100..106).collect::<Vec<_>>()), 96);
    Ok(found.iter().map(|found| found.number).collect())
}

fn cases() -> u32 {
    std::env::var("KVCELLAR_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300)
}

#[test]
fn an_undamaged_copy_comes_back_whole() {
    let found = check(sound()).expect("sound");
    assert!(found.len() >= 3 && !found.contains(&1) && !found.contains(&7), "{found:?}");
}

#[test]
fn a_torn_file_is_never_adopted() {
    let whole = sound();
    for len in [0, 1, 87, 88, 4096, 65_535, 65_536, 65_600, 69_632, whole.len() - 4096, whole.len() - 1] {
        assert_eq!(check(&whole[..len]).expect("sound"), NONE, "{len} bytes");
    }
    assert_eq!(check(&[whole, &[0; 4096][..]].concat()).expect("sound"), NONE, "too long");
    let mut headless = whole.to_vec();
    headless[..4096].fill(0);
    assert_eq!(check(&headless).expect("sound"), NONE);
}

#[test]
fn every_flipped_bit_of_the_purpose_is_noticed() {
    for at in 0..88 {
        let mut bytes = sound().to_vec();
        bytes[at] ^= 1 << (at % 8);
        assert_eq!(check(&bytes).expect("sound"), NONE, "byte {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_damaged_nothing_wrong_comes_back(damage in prop::collection::vec(damage(), 1..6)) {
        let mut bytes = sound().to_vec();
        damage.iter().for_each(|damage| damage.apply(&mut bytes));
        check(&bytes)?;
    }
}
