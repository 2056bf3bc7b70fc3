//! Results as tables for people.

use std::fmt::Write as _;

use super::replay::{Keeper, Row, Sizes};
use super::sweep::{Curves, Point};
use super::what_if::Estimate;
use kvcellar_block::size::show;

/// One workload at one size: a row for each keeper.
pub fn one_size(workload: &str, sizes: Sizes, block_bytes: u64, rows: &[Row]) -> String {
    let tier = |blocks: u32| format!("{blocks} blocks ({})", show(u64::from(blocks) * block_bytes));
    let mut text = format!("{workload}: dram {}, nvme {}\n", tier(sizes.dram_blocks), tier(sizes.nvme_blocks));
    let _ = writeln!(
        text,
        "{:<9} {:>7} {:>7} {:>10} {:>12} {:>10} {:>12} {:>10} {:>10} {:>12} {:>9} {:>9} {:>10}",
        "policy",
        "blocks",
        "tokens",
        "dram hits",
        "tokens",
        "nvme hits",
        "tokens",
        "stored",
        "loaded",
        "written/day",
        "TTFT p50",
        "p90",
        "saved"
    );
    for Row { keeper, summary } in rows {
        let _ = writeln!(
            text,
            "{:<9} {:>6.2}% {:>6.2}% {:>10} {:>12} {:>10} {:>12} {:>10} {:>10} {:>12} {:>6.0} ms {:>6.0} ms {:>8.0} s",
            keeper.name(),
            summary.hit_blocks_share * 100.0,
            summary.hit_tokens_share * 100.0,
            summary.dram_hit_blocks,
            summary.dram_hit_tokens,
            summary.nvme_hit_blocks,
            summary.nvme_hit_tokens,
            show(summary.stored_bytes),
            show(summary.loaded_bytes),
            show(summary.nvme_written_bytes_per_day),
            summary.ttft_p50_ms,
            summary.ttft_p90_ms,
            summary.prefill_saved_s,
        );
        for tenant in &summary.tenants {
            let _ = writeln!(text, "  {:<16}{:>6.2}% of its tokens", tenant.name, tenant.hit_tokens_share * 100.0);
        }
    }
    text
}

/// What engines would say of other capacities: a row for each policy, in percent of blocks found.
pub fn what_if(estimates: &[Estimate]) -> String {
    let mut text = String::new();
    if estimates.is_empty() {
        return text;
    }
    let _ = writeln!(text, "live what-if, blocks found, %");
    let _ = writeln!(text, "{:<9} {:>8} {:>8} {:>8} {:>8}", "policy", "sampled", "now", "double", "infinite");
    for Estimate { policy, rate, now, double, infinite } in estimates {
        let [rate, now, double, infinite] = [rate, now, double, infinite].map(|share| share * 100.0);
        let _ = writeln!(text, "{policy:<9} {rate:>8.2} {now:>8.2} {double:>8.2} {infinite:>8.2}");
    }
    text
}

/// One workload over capacities: a column for each keeper, in percent of blocks found.
pub fn curves(curves: &Curves) -> String {
    let mut text = format!("{}: {} different blocks; blocks found, %\n", curves.workload, curves.different_blocks);
    let _ = write!(text, "{:<22}", "capacity");
    for keeper in Keeper::all() {
        let _ = write!(text, "{:>10}", keeper.name());
    }
    text.push('\n');
    let mut rows: Vec<(u32, Sizes)> = Vec::new();
    for Point { capacity_percent, sizes, .. } in curves.one_tier.iter().chain(&curves.two_tiers) {
        if !rows.contains(&(*capacity_percent, *sizes)) {
            rows.push((*capacity_percent, *sizes));
        }
    }
    for (percent, sizes) in rows {
        let whole = u64::from(sizes.dram_blocks) + u64::from(sizes.nvme_blocks);
        let share = u64::from(sizes.dram_blocks) * 100 / whole.max(1);
        let label =
            if sizes.nvme_blocks == 0 { format!("{percent}%") } else { format!("{percent}%, dram {share}% of it") };
        let _ = write!(text, "{label:<22}");
        for keeper in Keeper::all() {
            let mut points = curves.one_tier.iter().chain(&curves.two_tiers);
            let found = points.find(|point| point.keeper == keeper && point.sizes == sizes);
            let _ = match found {
                Some(point) => write!(text, "{:>10.2}", point.summary.hit_blocks_share * 100.0),
                None => write!(text, "{:>10}", ""),
            };
        }
        text.push('\n');
    }
    if let Some(knee) = curves.knee_percent {
        let blocks = curves.different_blocks * u64::from(knee) / 100;
        let _ = writeln!(text, "knee of the adaptive policy's curve: {knee}% ({blocks} blocks)");
    }
    text
}
