//! Shares of tenants in both tiers, through the real cleaner and a real store.

use std::collections::HashMap;

use crate::rig::{Places, Rig};

/// Slots of the pool, those of the restore window among them; a quarter of them are 10.
const SLOTS: u64 = 40;
const QUARTER: u64 = 10;

const SHARES: &str = r#", "write_through": true,
    "tenants": {"quiet": {"guaranteed": "25%", "limit": "50%"}, "busy": {"limit": "25%"}}"#;

/// Blocks of each tenant in memory and on disk, as they were last told.
#[derive(Default)]
struct Told {
    blocks: HashMap<String, [u64; 2]>,
}

impl Told {
    fn of(&mut self, rig: &Rig, tenant: &str) -> [u64; 2] {
        for delta in rig.lock().take_stats().map(|stats| stats.tenants).unwrap_or_default() {
            self.blocks.insert(delta.name, delta.blocks.map(|(_, blocks)| blocks));
        }
        self.blocks.get(tenant).copied().unwrap_or_default()
    }
}

#[test]
fn shares_hold_in_both_tiers_whatever_others_store() {
    let places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, "2MiB", SHARES);
    let mut told = Told::default();
    rig.tenant = Some("quiet");
    for chain in 0..2 {
        rig.compute(chain, 8);
    }
    let first = told.of(&rig, "quiet");
    assert_eq!(first, [16, 16], "written through");
    rig.tenant = Some("busy");
    for chain in 10..50 {
        rig.compute(chain, 8);
        let has = told.of(&rig, "busy");
        assert!(has[0] <= QUARTER, "{has:?}");
    }
    rig.tenant = None;
    for chain in 60..160 {
        rig.compute(chain, 8);
    }
    let gauges = rig.gauges();
    let extents = gauges.nvme_extents;
    assert!(rig.counters().nvme_evicted_blocks > 0, "the store is full");
    let (quiet, busy) = (told.of(&rig, "quiet"), told.of(&rig, "busy"));
    assert!(quiet[0] >= QUARTER && busy[1] <= extents / 4, "{quiet:?} {busy:?} of {gauges:?}");
    // Whatever memory lost of the guaranteed share, the disk has.
    rig.tenant = Some("quiet");
    for chain in 0..2 {
        assert_eq!(rig.fetch(chain, 8), Ok(8), "chain {chain}");
    }
    rig.settle();
    assert_eq!(rig.counters().invariant_violations, 0);
}

#[test]
fn a_tenant_at_its_limit_on_disk_evicts_its_own_there() {
    let places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, "2MiB", SHARES);
    let mut told = Told::default();
    for chain in 60..160 {
        rig.compute(chain, 8);
    }
    let others = told.of(&rig, "other")[1];
    rig.tenant = Some("busy");
    for chain in 10..50 {
        rig.compute(chain, 8);
        let (has, extents) = (told.of(&rig, "busy"), rig.gauges().nvme_extents);
        assert!(has[1] <= extents / 4, "{has:?} of {extents}");
    }
    let (busy, left) = (told.of(&rig, "busy")[1], told.of(&rig, "other")[1]);
    assert!(busy > 0 && left >= others - busy, "others lost no more than it has: {others} {left} {busy}");
}

#[test]
fn blocks_of_before_a_restart_become_their_first_users() {
    let places = Places::new();
    let mut rig = Rig::open(&places, SLOTS, "2MiB", SHARES);
    rig.tenant = Some("quiet");
    rig.compute(1, 8);
    rig.stop();
    let mut rig = Rig::open(&places, SLOTS, "2MiB", SHARES);
    let mut told = Told::default();
    rig.compute(2, 1);
    assert_eq!((told.of(&rig, "quiet"), told.of(&rig, "other")[0]), ([0, 0], 9));
    rig.tenant = Some("quiet");
    assert_eq!(rig.fetch(1, 8), Ok(8));
    rig.settle();
    assert_eq!((told.of(&rig, "quiet")[0], told.of(&rig, "other")[0]), (8, 1));
}
