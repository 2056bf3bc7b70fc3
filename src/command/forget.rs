//! `kvcellar forget`: the right to erasure, for everything of one `cache_salt`.
//!
//! A running engine is asked through its own API, by a request with the salt: nobody can forget
//! what is not theirs. Files that no engine uses are worked on directly.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvcellar_block::SaltTag;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::size::show;
use kvcellar_engine::owned::erased::Erased;
use kvcellar_engine::pool::directory::present;
use kvcellar_engine::tier::ForgetReport;
use kvcellar_engine::{nvme, pool};
use kvcellar_route::scrape::{label, sample};
use serde::Serialize;
use serde_json::{Value, json};

use super::engine_api::{self, ApiFailure, EngineApi};
use super::{input, store};

/// What is asked of an engine that does not tell what it forgot.
const SILENT: &str = "it answered, and did not say that it forgot anything. Its KV Cellar is of an earlier version or \
                      out of service, or its `local_engines` still start: see its log, and try again";

/// The most data-parallel engines behind one address.
const RANKS_MAX: i64 = 4096;

/// What no command reaches, for people.
const OUT_OF_REACH: &str = "not reached: vLLM's own KV cache on the GPU (POST /reset_prefix_cache, or a restart), other \
                            engines and machines, copies of the files, logs and traces";

/// Whose blocks, and where.
#[derive(Debug, Clone, Args)]
#[command(group(clap::ArgGroup::new("whose").required(true).args(["salt", "salt_file"])))]
#[command(group(clap::ArgGroup::new("where").required(true).multiple(true).args(["url", "nvme_dir", "pool_dir"])))]
pub struct ForgetOptions {
    /// The requests' `cache_salt`. Other users of this machine see it in the list of processes:
    /// write `--salt-file` where that matters.
    #[arg(long)]
    pub salt: Option<String>,
    /// A file whose one line is the salt; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    pub salt_file: Option<PathBuf>,
    /// The address of a running engine, e.g. `http://127.0.0.1:8000`. Again for each further one:
    /// a router would ask only one of its engines.
    #[arg(long, conflicts_with_all = ["nvme_dir", "pool_dir"])]
    pub url: Vec<String>,
    /// How many data-parallel engines each address has, where its `/metrics` cannot tell: the
    /// command asks them all.
    #[arg(long, requires = "url", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=RANKS_MAX))]
    pub ranks: Option<u32>,
    /// The model to name in requests; the first that the engine serves without it.
    #[arg(long, requires = "url")]
    pub model: Option<String>,
    /// A file with the engine's API key.
    #[arg(long, requires = "url", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// How long an engine may take, in s.
    #[arg(long, default_value_t = 600)]
    pub timeout_s: u64,
    /// The directory given as `nvme_dir` to engines that are stopped.
    #[arg(long)]
    pub nvme_dir: Option<PathBuf>,
    /// The directory given as `pool_dir` to engines that are stopped: `/dev/shm` where none was.
    #[arg(long)]
    pub pool_dir: Option<PathBuf>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// One engine, pool or store.
#[derive(Debug, Serialize)]
struct ForgottenPlace {
    name: String,
    #[serde(flatten)]
    outcome: ForgetOutcome,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum ForgetOutcome {
    Engine(ForgetReport),
    Pool(Erased),
    Store(Erased),
    Error(String),
}

impl ForgetOutcome {
    fn is_complete(&self) -> bool {
        match self {
            Self::Engine(forgotten) => forgotten.failed == 0,
            Self::Pool(_) | Self::Store(_) => true,
            Self::Error(_) => false,
        }
    }
}

/// Forgets a salt. The exit code.
pub fn run(options: &ForgetOptions) -> i32 {
    let rows = salt_of(options).and_then(|salt| {
        if options.url.is_empty() { files(options, SaltTag::of(salt.as_bytes())) } else { engines(options, &salt) }
    });
    match rows {
        Ok(rows) => print(&rows, options.json),
        Err(error) => super::refused(&error),
    }
}

fn salt_of(options: &ForgetOptions) -> Result<String> {
    let salt = match (&options.salt, &options.salt_file) {
        (Some(salt), _) => salt.clone(),
        (None, Some(path)) => {
            let text = input::text(path, "Name a file with the salt")?;
            text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line)).to_owned()
        }
        (None, None) => String::new(),
    };
    if salt.is_empty() || salt.contains('\n') {
        return Err(Error::config("salt", "it is empty or has several lines", "Name the requests' cache_salt"));
    }
    Ok(salt)
}

fn engines(options: &ForgetOptions, salt: &str) -> Result<Vec<ForgottenPlace>> {
    let patience = Duration::from_secs(options.timeout_s.max(1));
    let key_file = options.api_key_file.as_deref();
    let apis = options.url.iter().map(|url| EngineApi::new(url, key_file, patience)).collect::<Result<Vec<_>>>()?;
    engine_api::run(async {
        let mut rows = Vec::new();
        for api in &apis {
            let ranks = match options.ranks {
                Some(count) => Ok(numbered((0..count).collect())),
                None => ranks(api).await,
            };
            let ranks = ranks.unwrap_or_else(|why| {
                rows.push(ForgottenPlace { name: api.url().to_owned(), outcome: ForgetOutcome::Error(why) });
                Vec::new()
            });
            for rank in ranks {
                let outcome = match ask(api, options.model.as_deref(), salt, rank).await {
                    Ok(forgotten) => ForgetOutcome::Engine(forgotten),
                    Err(why) => ForgetOutcome::Error(why),
                };
                let name = rank.map_or_else(|| api.url().to_owned(), |rank| format!("{} rank {rank}", api.url()));
                rows.push(ForgottenPlace { name, outcome });
            }
        }
        rows
    })
}

/// The data-parallel engines behind an address, each of which has tiers of its own; `None` for the
/// one that there is. Who asked one of several would call done what the others keep.
async fn ranks(api: &EngineApi) -> std::result::Result<Vec<Option<u32>>, String> {
    let text = api.get("/metrics").await.map_err(|failure| {
        format!(
            "/metrics, which says how many data-parallel engines there are: {failure}. Write --ranks, 1 for one engine"
        )
    })?;
    let of_ours = text.lines().filter_map(sample).filter(|(name, ..)| name.starts_with("vllm:kvcellar_"));
    let mut found: Vec<u32> = of_ours.filter_map(|(_, labels, _)| label(labels, "engine")?.parse().ok()).collect();
    found.sort_unstable();
    found.dedup();
    Ok(numbered(found))
}

fn numbered(ranks: Vec<u32>) -> Vec<Option<u32>> {
    if ranks.len() > 1 { ranks.into_iter().map(Some).collect() } else { vec![None] }
}

async fn ask(
    api: &EngineApi,
    model: Option<&str>,
    salt: &str,
    rank: Option<u32>,
) -> std::result::Result<ForgetReport, String> {
    let said = |failure: ApiFailure| failure.to_string();
    let model = match model {
        Some(model) => model.to_owned(),
        None => api.first_model().await.map_err(said)?,
    };
    // One token, in every vocabulary: the request is about its salt.
    let body = json!({
        "model": model,
        "prompt": [1],
        "max_tokens": 1,
        "cache_salt": salt,
        "kv_transfer_params": {"kvcellar": {"forget": true}},
    });
    let headers: Vec<(&str, String)> = rank.iter().map(|rank| ("x-data-parallel-rank", rank.to_string())).collect();
    let answer = api.post("/v1/completions", &body, &headers).await.map_err(said)?;
    let told: &Value = &answer["kv_transfer_params"]["kvcellar"]["forgotten"];
    serde_json::from_value(told.clone()).map_err(|_| SILENT.to_owned())
}

fn files(options: &ForgetOptions, salt: SaltTag) -> Result<Vec<ForgottenPlace>> {
    let mut rows = Vec::new();
    if let Some(dir) = &options.pool_dir {
        present("--pool-dir", dir)?;
        for entry in pool::registry::list(dir)? {
            rows.push(row(&entry.name, ForgetOutcome::Pool, "pool rm", pool::erasure::forget(&entry, salt)));
        }
    }
    if let Some(dir) = &options.nvme_dir {
        present("--nvme-dir", dir)?;
        for entry in nvme::registry::list(dir)? {
            let mut bar = store::bar(&entry.name);
            rows.push(row(
                &entry.name,
                ForgetOutcome::Store,
                "store drop",
                nvme::erasure::forget(&entry.path, salt, &mut bar),
            ));
        }
    }
    Ok(rows)
}

/// `remove`: the command that removes what cannot be read.
fn row(name: &str, kind: fn(Erased) -> ForgetOutcome, remove: &str, outcome: Result<Erased>) -> ForgottenPlace {
    let outcome = match outcome {
        Ok(erased) => kind(erased),
        Err(Error::TryLater { holder, .. }) => {
            ForgetOutcome::Error(format!("{holder}: ask that engine itself, with --url http://..., or stop it"))
        }
        Err(error @ Error::DataLost { .. }) => ForgetOutcome::Error(format!(
            "{error}. Nobody can tell whose its blocks are: remove it with `kvcellar {remove}`"
        )),
        Err(error) => ForgetOutcome::Error(error.to_string()),
    };
    ForgottenPlace { name: name.to_owned(), outcome }
}

fn print(rows: &[ForgottenPlace], json: bool) -> i32 {
    let code = i32::from(!rows.iter().all(|row| row.outcome.is_complete()));
    if json {
        return store::print_json(&rows).max(code);
    }
    if rows.is_empty() {
        println!("nothing lies there");
        return 0;
    }
    let line = |cells: [&str; 6]| {
        let [name, dram, nvme, unknown, bytes, failed] = cells;
        println!("{name:<40} {dram:>10} {nvme:>10} {unknown:>10} {bytes:>10} {failed:>10}");
    };
    line(["name", "in memory", "on disk", "unknown", "erased", "failed"]);
    for ForgottenPlace { name, outcome } in rows {
        let none = || "-".to_owned();
        let count = |number: u64| number.to_string();
        let (dram, nvme, unknown, bytes, failed) = match outcome {
            ForgetOutcome::Engine(told) => {
                (count(told.dram_blocks), count(told.nvme_blocks), none(), told.bytes_erased, told.failed)
            }
            ForgetOutcome::Pool(erased) => (count(erased.blocks), none(), count(erased.unknown), erased.bytes, 0),
            ForgetOutcome::Store(erased) => (none(), count(erased.blocks), count(erased.unknown), erased.bytes, 0),
            ForgetOutcome::Error(why) => {
                eprintln!("kvcellar: {name}: {why}");
                continue;
            }
        };
        line([name, &dram, &nvme, &unknown, &show(bytes), &count(failed)]);
    }
    println!("{OUT_OF_REACH}");
    if code != 0 {
        eprintln!("kvcellar: not all is forgotten");
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_does_not_say_so_is_no_confirmation() {
        let told = json!({"dram_blocks": 3, "nvme_blocks": 2, "slots_erased": 4, "extents_erased": 2, "bytes_erased": 9, "failed": 0});
        assert_eq!(serde_json::from_value::<ForgetReport>(told).expect("whole").dram_blocks, 3);
        for other in [Value::Null, json!({}), json!({"dram_blocks": 3}), json!("yes")] {
            assert!(serde_json::from_value::<ForgetReport>(other).is_err());
        }
        assert!(!ForgetOutcome::Engine(ForgetReport { failed: 1, ..ForgetReport::default() }).is_complete());
    }
}
