//! Pools in huge pages that were set aside. Skipped, with the reason, where none can be.

use std::fs;

use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::file_system::{FileSystem, FileSystemKind};

use crate::mounts::{Tmpfs, touch_all};
use crate::place::Purpose;
use crate::stock::Stock;

const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Huge pages of the system, given back when dropped.
struct Reserved {
    before: String,
}

impl Reserved {
    fn pages(count: u64) -> Option<Self> {
        let before = fs::read_to_string(PAGES).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + count;
        let reserved = Self { before };
        fs::write(PAGES, wanted.to_string()).ok()?;
        let got: u64 = fs::read_to_string(PAGES).ok()?.trim().parse().ok()?;
        (got >= wanted).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // The machine keeps some huge pages more, which is all that can go wrong.
        drop(fs::write(PAGES, &self.before));
    }
}

#[test]
fn a_pool_lies_in_huge_pages_and_survives_there() {
    let Some(_pages) = Reserved::pages(5) else {
        println!("skipped: no huge pages can be reserved here");
        return;
    };
    let Some(mount) = Tmpfs::huge() else { return };
    let found = FileSystem::of(&mount.path).expect("it is mounted");
    assert_eq!((found.kind, found.page_bytes), (FileSystemKind::Hugetlbfs, 2 << 20));
    let purpose = Purpose::of(550, 2, 4096);
    assert!(purpose.bytes > 6 << 20 && purpose.bytes < 8 << 20, "{}", purpose.bytes);
    let opened = purpose.open(&mount.path).expect("a pool");
    assert!(opened.pool.bytes().is_multiple_of(2 << 20) && opened.pool.bytes() <= purpose.bytes);
    assert!(opened.pool.slot_count() > 400, "{} slots", opened.pool.slot_count());
    touch_all(&opened.pool);
    let entry = kvcellar_engine::pool::registry::list(&mount.path).expect("listed").remove(0);
    assert_eq!((entry.bytes, entry.file_bytes), (opened.pool.bytes(), opened.pool.bytes()));
    let worker = Pool::attach(&opened.pool.ticket()).expect("a worker attaches");
    worker.touch();
    drop(worker);
    let mut stock = Stock::of(opened);
    stock.store(&[1, 2, 3], |_| true);
    drop(stock);
    let opened = purpose.open(&mount.path).expect("the pool");
    assert!(opened.adopted);
    assert_eq!(Stock::of(opened).hit(&[1, 2, 3]), 48);
    // Another model takes the place: there is no room for both.
    let other = purpose.of_model(2).open(&mount.path).expect("the room of the leftover");
    assert!(!other.adopted && other.removed.len() == 1, "{:?}", other.removed);
    // A second engine gets what pages are left, or is told of them.
    match purpose.of_model(3).open(&mount.path) {
        Ok(second) => assert!(second.warnings[0].contains("huge pages"), "{:?}", second.warnings),
        Err(error) => assert!(error.to_string().contains("huge pages"), "{error}"),
    }
}
