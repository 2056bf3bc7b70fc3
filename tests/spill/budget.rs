//! A bound of what is written to disk.

use std::time::{Duration, Instant};

use crate::rig::{BLOCK_BYTES, Places, Rig};

/// Chains of eight blocks, far more than the budget allows at once.
const CHAINS: u32 = 20;
const BYTES_PER_S: f64 = 256.0 * 1024.0;

#[test]
fn a_write_budget_holds_at_every_moment() {
    let places = Places::new();
    let started = Instant::now();
    let more = r#", "nvme_write_budget": "256KiB/s", "write_through": true"#;
    let mut rig = Rig::open(&places, 34, "64MiB", more);
    let mut chain = 0;
    while chain < CHAINS || rig.counters().spilled_blocks < 4 {
        rig.compute(chain, 8);
        chain += 1;
        let written = rig.counters().spilled_bytes as f64;
        assert!(written <= BYTES_PER_S * started.elapsed().as_secs_f64(), "{written} bytes after {chain} chains");
        assert!(started.elapsed() < Duration::from_mins(2), "nothing is ever written");
    }
    let counters = rig.counters();
    assert_eq!((counters.disk_errors, counters.invariant_violations), (0, 0));
    assert!(rig.gauges().nvme_write_budget_left_bytes < 2 * BLOCK_BYTES as u64, "a twentieth, or one block");
}

#[test]
fn an_empty_budget_costs_the_disk_alone() {
    let places = Places::new();
    // A block's worth comes in seven minutes.
    let more = r#", "nvme_write_budget": "4MiB/d", "write_through": true"#;
    let mut rig = Rig::open(&places, 34, "64MiB", more);
    for chain in 0..CHAINS {
        rig.compute(chain, 8);
    }
    assert_eq!(rig.counters().spilled_blocks, 0, "it begins empty");
    assert_eq!(rig.fetch(CHAINS - 1, 8), Ok(8), "memory goes on");
}
