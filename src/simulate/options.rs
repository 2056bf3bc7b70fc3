//! The command line of `kvcellar simulate`, and what it runs.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use hashbrown::HashSet;
use serde_json::{Value, json};

use super::account::Account;
use super::device::DeviceModel;
use super::replay::{Choices, Keeper, Row, Sizes, replay};
use super::sweep::{self, Curves};
use super::synthetic::{BLOCK_TOKENS, Synthetic, Workload};
use super::trace::WorkloadSource;
use super::{picture, table, what_if};
use kvcellar_bench::report::{Goal, print_goals, report};
use kvcellar_block::error::{Error, Result};
use kvcellar_engine::config::{Config, size};
use kvcellar_engine::policy::{Admission, LoadPolicy, PolicyName};

/// Which blocks are written to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdmissionChoice {
    /// Every block.
    All,
    /// While there is room every block, then only those that were used again.
    Reused,
}

/// Whether what lies on disk is loaded or computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadChoice {
    /// Loaded.
    Always,
    /// What is predicted to be faster.
    Auto,
    /// Computed.
    Never,
}

/// What to replay, over what.
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[derive(Debug, Clone, Args)]
pub struct SimulateOptions {
    /// Trace in Mooncake's format: one JSON object a line, with `timestamp` (ms),
    /// `input_length`, `output_length` (tokens) and `hash_ids`.
    #[arg(required_unless_present_any = ["synthetic", "workloads"])]
    pub trace: Option<PathBuf>,
    /// A made-up workload instead.
    #[arg(long, value_enum, conflicts_with = "trace")]
    pub synthetic: Option<Workload>,
    /// With `--sweep`: every made-up workload as well.
    #[arg(long, requires = "sweep")]
    pub workloads: bool,
    /// Seed of made-up workloads.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests of made-up workloads, in percent of the usual number.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "PERCENT")]
    pub load: u32,
    /// Tokens of a trace's block.
    #[arg(long, default_value_t = BLOCK_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_tokens: u32,
    /// Bytes of a block's KV, all layers and ranks together.
    #[arg(long, default_value = "64MiB")]
    pub block_size: String,
    /// Policy of both tiers: lru, s3fifo, arc, lrfu or adaptive; or all, with the bounds beside
    /// them: Belady, who knows the future, and an infinite cache.
    #[arg(long, default_value = "all")]
    pub policy: String,
    /// Size of the dram tier: a size such as 64GiB, or a share of the workload's different blocks
    /// such as 10%.
    #[arg(long, default_value = "10%")]
    pub dram: String,
    /// Size of the nvme tier, in the same way; 0: there is none.
    #[arg(long, default_value = "0")]
    pub nvme: String,
    /// Which blocks are written to disk.
    #[arg(long, value_enum, default_value = "all")]
    pub admission: AdmissionChoice,
    /// Whether what lies on disk is loaded or computed.
    #[arg(long, value_enum, default_value = "always")]
    pub load_policy: LoadChoice,
    /// Share of the slots, in percent, kept free or clean.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=100))]
    pub clean_percent: u64,
    /// Bytes that may be written to disk in a time, such as 2TB/day.
    #[arg(long, value_name = "RATE", conflicts_with = "sweep")]
    pub write_budget: Option<String>,
    /// Shares of tenants, as the configuration's key `tenants`; requests are told apart by the
    /// trace's field `tenant`.
    #[arg(long, value_name = "JSON", conflicts_with = "sweep")]
    pub tenants: Option<String>,
    /// The modelled device.
    #[command(flatten)]
    pub device: DeviceModel,
    /// Also shows what an engine's live what-if would say of this workload: with this capacity,
    /// twice as much, and without end.
    #[arg(long, conflicts_with = "sweep")]
    pub what_if: bool,
    /// Curves over capacities from 1% to 50% of the workload's different blocks, over one tier and
    /// over both, with all policies and bounds.
    #[arg(long)]
    pub sweep: bool,
    /// With `--sweep`: writes the report to this file, and a picture of it beside, with the suffix
    /// `.svg`.
    #[arg(long, requires = "sweep")]
    pub report: Option<PathBuf>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

impl SimulateOptions {
    fn sources(&self) -> Vec<WorkloadSource> {
        let made = |workload| WorkloadSource::Made(Synthetic { workload, seed: self.seed, load_percent: self.load });
        let file = |path: &PathBuf| WorkloadSource::File { path: path.clone(), block_tokens: self.block_tokens };
        let more = self.workloads.then_some(Workload::ALL).into_iter().flatten();
        self.trace.iter().map(file).chain(self.synthetic.into_iter().chain(more).map(made)).collect()
    }

    fn account(&self, source: &WorkloadSource) -> Result<Account> {
        let block_tokens = match source {
            WorkloadSource::File { block_tokens, .. } => *block_tokens,
            WorkloadSource::Made(_) => BLOCK_TOKENS,
        };
        let block_bytes = size::parse("block_size", &Value::from(self.block_size.as_str()))?;
        Ok(Account { device: self.device, block_tokens, block_bytes })
    }

    fn choices(&self) -> Result<Choices> {
        // These are written as in the configuration.
        let mut keys = json!({});
        if let Some(text) = &self.tenants {
            let no_json = |error| Error::config("--tenants", format!("no JSON ({error})"), "Write the key's value");
            keys["tenants"] = serde_json::from_str(text).map_err(no_json)?;
        }
        if let Some(rate) = &self.write_budget {
            keys["nvme_dir"] = json!("/");
            keys["nvme_write_budget"] = json!(rate);
        }
        let config = Config::parse(&keys.to_string())?;
        Ok(Choices {
            admission: match self.admission {
                AdmissionChoice::All => Admission::All,
                AdmissionChoice::Reused => Admission::Reused,
            },
            load_policy: match self.load_policy {
                LoadChoice::Always => LoadPolicy::Always,
                LoadChoice::Auto => LoadPolicy::Auto,
                LoadChoice::Never => LoadPolicy::Never,
            },
            clean_percent: self.clean_percent,
            write_budget: config.nvme.write_budget,
            tenants: config.tenants,
        })
    }

    fn keepers(&self) -> Result<Vec<Keeper>> {
        if self.policy == "all" {
            return Ok(Keeper::all());
        }
        let names = PolicyName::ALL.map(PolicyName::name).join(", ");
        let unknown = || Error::config("--policy", format!("{} is none", self.policy), format!("Write {names} or all"));
        PolicyName::named(&self.policy).map(|policy| vec![Keeper::Policy(policy)]).ok_or_else(unknown)
    }
}

/// Different blocks of a workload.
fn different_blocks(source: &WorkloadSource) -> Result<u64> {
    let mut seen = HashSet::new();
    source.each(&mut |request| {
        seen.extend(request.blocks.iter().copied());
        Ok(())
    })?;
    if seen.is_empty() { Err(nothing(source)) } else { Ok(seen.len() as u64) }
}

fn nothing(source: &WorkloadSource) -> Error {
    Error::config(&source.name(), "holds no request", "Name a trace with a line for each request")
}

#[expect(clippy::cast_sign_loss, reason = "a share of a count is not negative")]
/// A tier's blocks. `different`: the workload's different blocks, counted when a share is asked
/// for.
fn blocks_of(
    flag: &'static str,
    text: &str,
    block_bytes: u64,
    different: &mut dyn FnMut() -> Result<u64>,
) -> Result<u32> {
    let wrong =
        || Error::config(flag, format!("{text} is no size"), "Write a size such as 64GiB, or a share such as 10%");
    let blocks = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            if !(0.0..=100.0).contains(&percent) {
                return Err(wrong());
            }
            (different()? as f64 * percent / 100.0) as u64
        }
        None => size::parse_or_zero(flag, &Value::from(text)).map_err(|_| wrong())? / block_bytes,
    };
    u32::try_from(blocks).map_err(|_| Error::config(flag, format!("{blocks} blocks are too many"), "Write less"))
}

fn one_size(options: &SimulateOptions, source: &WorkloadSource) -> Result<(Sizes, Account, Vec<Row>)> {
    let account = options.account(source)?;
    let mut counted = None;
    let mut different = || match counted {
        Some(known) => Ok(known),
        None => different_blocks(source).inspect(|blocks| counted = Some(*blocks)),
    };
    let dram_blocks = blocks_of("--dram", &options.dram, account.block_bytes, &mut different)?;
    let nvme_blocks = blocks_of("--nvme", &options.nvme, account.block_bytes, &mut different)?;
    if dram_blocks == 0 {
        return Err(Error::config("--dram", "holds no block", "Write a larger size, or a smaller --block-size"));
    }
    let sizes = Sizes { dram_blocks, nvme_blocks };
    let choices = options.choices()?;
    let row = |keeper: Keeper| {
        let totals = replay(source, &account, keeper, sizes, &choices)?;
        if totals.requests == 0 {
            return Err(nothing(source));
        }
        Ok(Row { keeper, summary: totals.summary(account.block_bytes) })
    };
    let rows = options.keepers()?.into_iter().map(row).collect::<Result<Vec<Row>>>()?;
    Ok((sizes, account, rows))
}

fn all_sizes(options: &SimulateOptions) -> Result<(Vec<Curves>, Vec<Goal>)> {
    let mut all = Vec::new();
    for source in options.sources() {
        let account = options.account(&source)?;
        let different = different_blocks(&source)?;
        let mut progress = |what: &str| log_progress(what);
        // Both tiers for what was asked for by name; made-up workloads are there to compare
        // policies.
        let two_tiers = !options.workloads || matches!(source, WorkloadSource::File { .. });
        all.push(sweep::sweep(&source, &account, &options.choices()?, different, two_tiers, &mut progress)?);
    }
    let goals = sweep::goals(&all);
    Ok((all, goals))
}

fn log_progress(what: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r{what:<60}");
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)
        .map_err(|error| Error::io("writing", path, error, "Name a file in a directory that you may write to"))
}

/// Replays, and prints or writes what was asked for.
///
/// # Errors
/// [`Error::Config`] for a line of the trace or a wrong option, [`Error::Io`] for files.
pub fn run(options: &SimulateOptions) -> Result<()> {
    if options.report.as_ref().is_some_and(|path| path.extension().is_some_and(|it| it == "svg")) {
        return Err(Error::config("--report", "is the picture's name", "Write a name that ends in .json"));
    }
    if !options.sweep {
        let sources = options.sources();
        let Some(source) = sources.first() else { return Ok(()) };
        let (sizes, account, rows) = one_size(options, source)?;
        let estimates = if options.what_if { what_if::estimates(source, &rows, sizes)? } else { Vec::new() };
        if options.json {
            let mut whole = json!({ "workload": source.name(), "sizes": sizes, "block_bytes": account.block_bytes,
                "device": account.device, "results": rows });
            if options.what_if {
                whole["what_if"] = json!(estimates);
            }
            println!("{whole:#}");
        } else {
            print!("{}", table::one_size(&source.name(), sizes, account.block_bytes, &rows));
            print!("{}", table::what_if(&estimates));
        }
        return Ok(());
    }
    let (all, goals) = all_sizes(options)?;
    log_progress("");
    let mut whole = report(&[], &goals);
    whole["device"] = json!(options.device);
    whole["block_size"] = json!(options.block_size);
    whole["workloads"] = json!(all);
    if options.json {
        println!("{whole:#}");
    } else {
        for curves in &all {
            print!("{}", table::curves(curves));
        }
        print_goals(&goals, 3);
    }
    if let Some(path) = &options.report {
        write(path, &format!("{whole:#}\n"))?;
        write(&path.with_extension("svg"), &picture::picture(&all))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: SimulateOptions,
    }

    fn options(text: &str) -> SimulateOptions {
        Line::try_parse_from(std::iter::once("simulate").chain(text.split_whitespace())).expect("known options").options
    }

    fn rows(text: &str) -> Result<Vec<Row>> {
        let options = options(text);
        one_size(&options, &options.sources()[0]).map(|(_, _, rows)| rows)
    }

    #[test]
    fn no_policy_finds_more_than_an_infinite_cache() {
        for workload in Workload::ALL.map(|workload| workload.to_possible_value().expect("a name")) {
            let rows = rows(&format!("--synthetic {} --load 4 --dram 5%", workload.get_name())).expect("a size");
            let hits = |keeper| {
                let row: Option<&Row> = rows.iter().find(|row| row.keeper == keeper);
                row.map_or(0, |row| row.summary.dram_hit_blocks)
            };
            assert_eq!(rows.len(), PolicyName::ALL.len() + 2);
            for row in &rows {
                assert!(row.summary.dram_hit_blocks <= hits(Keeper::Infinite), "{row:?}");
            }
            assert!(hits(Keeper::Belady) >= hits(Keeper::Policy(PolicyName::Lru)), "{rows:?}");
        }
    }

    #[test]
    fn what_memory_cannot_hold_is_found_on_disk() {
        let of = |nvme: &str| {
            let text = format!("--synthetic chat --load 10 --dram 3% --nvme {nvme} --policy lru");
            rows(&text).expect("a size")[0].summary.clone()
        };
        let (without, with) = (of("0"), of("60%"));
        assert_eq!((without.nvme_hit_blocks, without.nvme_written_bytes), (0, 0));
        assert!(with.nvme_hit_blocks > 0 && with.nvme_written_bytes > 0);
        assert!(with.hit_blocks_share > without.hit_blocks_share && with.ttft_mean_ms < without.ttft_mean_ms);
        let never = rows("--synthetic chat --load 10 --dram 3% --nvme 60% --policy lru --load-policy never");
        assert_eq!(never.expect("a size")[0].summary.nvme_hit_blocks, 0);
    }

    #[test]
    fn a_quiet_tenant_keeps_what_is_guaranteed_while_another_scans() {
        let found = |tenants: &str| {
            let text = format!("--synthetic tenants --load 30 --dram 5% --policy lru {tenants}");
            let rows = rows(&text).expect("a replay");
            let of =
                |name: &str| rows[0].summary.tenants.iter().find(|it| it.name == name).map(|it| it.hit_tokens_share);
            (of("quiet").expect("quiet"), of("scan").expect("scan"))
        };
        let (alone, _) = found("");
        let (guaranteed, _) = found(r#"--tenants {"quiet":{"guaranteed":"90%"}}"#);
        let (limited, _) = found(r#"--tenants {"scan":{"limit":"10%"}}"#);
        assert!(guaranteed > alone + 0.05 && limited > alone + 0.05, "{alone} {guaranteed} {limited}");
        let wrong = rows(r#"--synthetic chat --load 1 --tenants {"a":{"limit":"x"}}"#).expect_err("no share");
        assert!(wrong.to_string().contains("tenants.a.limit"), "{wrong}");
    }

    #[test]
    fn the_what_if_stands_beside_the_result() {
        let options = options("--synthetic chat --load 5 --dram 10% --policy all --what-if");
        let source = &options.sources()[0];
        let (sizes, _, rows) = one_size(&options, source).expect("a size");
        let estimates = what_if::estimates(source, &rows, sizes).expect("a workload");
        let names: Vec<&str> = estimates.iter().map(|estimate| estimate.policy).collect();
        assert_eq!(names, PolicyName::ALL.map(PolicyName::name), "bounds have none");
        for (estimate, row) in estimates.iter().zip(&rows) {
            assert!((estimate.now - row.summary.hit_blocks_share).abs() < 0.001, "a small tier is sampled whole");
            assert!(estimate.now <= estimate.double && estimate.double <= estimate.infinite + 0.01, "{estimate:?}");
        }
        let text = table::what_if(&estimates);
        assert_eq!(text.lines().count(), 2 + estimates.len(), "{text}");
        assert!(table::what_if(&[]).is_empty());
        run(&options).expect("it runs");
    }

    #[test]
    fn a_wrong_option_is_named() {
        for (text, named) in [
            ("--synthetic chat --load 1 --dram ten", "--dram"),
            ("--synthetic chat --load 1 --dram 1KiB", "--dram"),
            ("--synthetic chat --load 1 --nvme 101%", "--nvme"),
            ("--synthetic chat --load 1 --policy fifo", "--policy"),
            ("--synthetic chat --load 1 --block-size none", "block_size"),
            ("--synthetic chat --load 1 --write-budget much", "nvme_write_budget"),
        ] {
            assert!(rows(text).is_err_and(|error| error.to_string().contains(named)), "{text}");
        }
        assert!(Line::try_parse_from(["simulate"]).is_err(), "nothing to replay");
        let empty = tempfile::NamedTempFile::new().expect("a file");
        for dram in ["10%", "1GiB"] {
            let text = format!("{} --dram {dram} --policy lru", empty.path().display());
            assert!(rows(&text).is_err_and(|error| error.to_string().contains("holds no request")), "{dram}");
        }
        let picture = options("--synthetic chat --load 1 --sweep --report curves.svg");
        assert!(run(&picture).is_err_and(|error| error.to_string().contains("--report")));
    }

    #[test]
    fn a_sweep_writes_a_report_and_a_picture() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("curves.json");
        run(&options(&format!("--synthetic rag --load 2 --sweep --report {}", file.display()))).expect("it runs");
        let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
        let points = &report["workloads"][0]["one_tier"];
        assert_eq!(points.as_array().map(Vec::len), Some(6 * 7));
        assert!(report["workloads"][0]["knee_percent"].is_u64());
        assert!(report["goals"].as_array().is_some_and(|goals| goals.len() >= 2));
        let drawn = std::fs::read_to_string(file.with_extension("svg")).expect("a picture");
        assert!(drawn.starts_with("<svg") && drawn.ends_with("</svg>\n") && drawn.contains("adaptive"));
    }
}
