//! What engines say of themselves: `/metrics` now and then, `/v1/models` less often. Jittered,
//! bounded in time and size.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::{Method, StatusCode};
use bytes::Bytes;
use serde::Deserialize;

use super::engine::{Engine, Model, Told};
use super::engines::Engines;
use super::upstream::Upstream;
use crate::limits;

/// Scrapes between two looks at the models.
const MODELS_EVERY: u32 = 20;

#[derive(Deserialize)]
struct ServedModels {
    data: Vec<Model>,
}

/// Keeps asking all engines, for ever.
pub async fn keep(engines: Arc<Engines>, upstream: Upstream, every: Duration) {
    let mut tasks: Vec<(Arc<Engine>, tokio::task::JoinHandle<()>)> = Vec::new();
    loop {
        let list = engines.all();
        tasks.retain(|(engine, task)| {
            let stays = list.iter().any(|it| Arc::ptr_eq(it, engine));
            if !stays {
                task.abort();
            }
            stays
        });
        for engine in list.iter() {
            if !tasks.iter().any(|(known, _)| Arc::ptr_eq(known, engine)) {
                tasks.push((Arc::clone(engine), tokio::spawn(follow(Arc::clone(engine), upstream.clone(), every))));
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn follow(engine: Arc<Engine>, upstream: Upstream, every: Duration) {
    let (mut turn, mut said) = (0, false);
    loop {
        match look(&engine, &upstream).await {
            Ok(told) => {
                // Before it gets requests again: it may have come back with other models.
                let ask = turn % MODELS_EVERY == 0 || engine.is_back(&told) || engine.models.load().is_empty();
                if ask {
                    // Gateways know it by its addresses.
                    engine.endpoint().await;
                    if let Some(models) = models(&engine, &upstream).await {
                        engine.models.store(Arc::new(models));
                    }
                }
                turn += 1;
                if engine.heard(told) {
                    log::info!("{}: answers", engine.spec.name);
                }
            }
            Err(reason) => {
                // One that has never answered may have been named wrongly: said once, too.
                let is_new = !std::mem::replace(&mut said, true) && engine.health() == "unseen";
                if engine.failed() || is_new {
                    log::warn!("{}: does not answer: {reason}", engine.spec.name);
                }
            }
        }
        tokio::time::sleep(every.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
    }
}

/// What an engine says of itself. One that has no metrics (`SGLang` without `--enable-metrics`)
/// says nothing, but is well if it serves its models: its load is what this router gave it.
///
/// # Errors
/// Why it is not known to be well.
async fn look(engine: &Engine, upstream: &Upstream) -> Result<Told, String> {
    let (status, body) = get(engine, upstream, "/metrics").await?;
    if status == StatusCode::NOT_FOUND {
        let (status, _) = get(engine, upstream, "/v1/models").await?;
        if !status.is_success() {
            return Err(format!("neither /metrics nor /v1/models: {status}"));
        }
        if !engine.metrics_missed.swap(true, Ordering::Relaxed) {
            log::warn!(
                "{}: it has no /metrics: its load is known from this router's requests alone, and restarts are not \
                 seen. SGLang has them with --enable-metrics",
                engine.spec.name
            );
        }
        return Ok(Told::default());
    }
    if !status.is_success() {
        return Err(format!("/metrics: {status}"));
    }
    Ok(read(&String::from_utf8_lossy(&body)))
}

async fn get(engine: &Engine, upstream: &Upstream, path: &str) -> Result<(StatusCode, Bytes), String> {
    let limits = (Duration::from_millis(limits::SCRAPE_TIMEOUT_MS), limits::SCRAPE_BYTES_MAX);
    upstream.ask(Method::GET, &format!("{}{path}", engine.spec.url), Bytes::new(), limits).await
}

async fn models(engine: &Engine, upstream: &Upstream) -> Option<Vec<Model>> {
    let (status, body) = get(engine, upstream, "/v1/models").await.ok()?;
    if status == StatusCode::UNAUTHORIZED && !engine.key_missed.swap(true, Ordering::Relaxed) {
        log::warn!("{}: it wants a key to say what it serves: give the router one with --engine-key", engine.spec.name);
    }
    Some(serde_json::from_slice::<ServedModels>(&body).ok()?.data)
}

/// Name, labels and value of a sample of Prometheus's text; a time may follow, and labels may hold
/// anything in quotes.
pub fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let (name, labels, rest) = match line.split_once('{') {
        Some((name, rest)) => {
            let end = rest.rfind('}')?;
            (name, &rest[..end], &rest[end + 1..])
        }
        None => line.split_once(' ').map(|(name, rest)| (name, "", rest))?,
    };
    Some((name, labels, rest.split_ascii_whitespace().next()?.parse().ok()?))
}

/// The value of a sample that counts something; 0 where it is no such number.
pub fn count(value: f64) -> u64 {
    u64::try_from(value as i64).unwrap_or(0)
}

/// Reads metrics of vLLM and of `SGLang`. Data-parallel ranks behind one address are added up.
pub fn read(text: &str) -> Told {
    let mut told = Told::default();
    let (mut usages, mut newest) = (0_u32, f64::NEG_INFINITY);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels, value)) = sample(line) else { continue };
        match name {
            "vllm:num_requests_running" | "sglang:num_running_reqs" => told.running += value,
            "vllm:num_requests_waiting" | "sglang:num_queue_reqs" => told.waiting += value,
            // States other than `awake`: weights are elsewhere, or gone.
            "vllm:engine_sleep_state" => {
                told.asleep |= value > 0.0 && label(labels, "sleep_state").is_some_and(|state| state != "awake");
            }
            "sglang:max_total_num_tokens" => told.kv_tokens += count(value),
            "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" | "sglang:token_usage" => {
                told.kv_usage += value;
                usages += 1;
            }
            "vllm:cache_config_info" => {
                let number = |name| label(labels, name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
                told.kv_tokens += number("num_gpu_blocks") * number("block_size");
            }
            "vllm:kvcellar_pool_slots" if label(labels, "state") == Some("filled") => {
                *told.offloaded.dram.get_or_insert(0) += count(value);
            }
            "vllm:kvcellar_nvme_blocks" => *told.offloaded.nvme.get_or_insert(0) += count(value),
            "process_start_time_seconds" => told.started_s = value,
            // One line for every state there was; its value is when that was.
            "vllm:lora_requests_info" if value > newest => {
                newest = value;
                let names = |name| {
                    let text = label(labels, name).unwrap_or_default();
                    text.split(',').map(str::trim).filter(|it| !it.is_empty()).map(str::to_owned).collect()
                };
                let most = label(labels, "max_lora").and_then(|text| text.parse().ok()).unwrap_or(0);
                told.adapters = Some((most, names("running_lora_adapters"), names("waiting_lora_adapters")));
            }
            _ => {}
        }
    }
    told.kv_usage /= f64::from(usages.max(1));
    told
}

/// The value of a label among the labels of a sample.
pub fn label<'t>(labels: &'t str, name: &str) -> Option<&'t str> {
    let mut rest = labels;
    while let Some(at) = rest.find(name) {
        let before = rest[..at].bytes().last();
        let after = &rest[at + name.len()..];
        if let (None | Some(b',' | b'{'), Some(value)) = (before, after.strip_prefix("=\"")) {
            return value.split('"').next();
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::engine::OffloadedBlocks;
    use super::*;

    #[test]
    fn vllms_metrics_are_read() {
        let text = r#"# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.3
vllm:cache_config_info{block_size="16",mamba_block_size="None",num_gpu_blocks="100"} 1.0
process_start_time_seconds 1.7e+09
vllm:kvcellar_pool_slots{engine="0",state="total"} 90.0
vllm:kvcellar_pool_slots{engine="0",state="filled"} 40.0
vllm:kvcellar_pool_slots{engine="1",state="filled"} 2.0
vllm:kvcellar_nvme_blocks{engine="0"} 7.0
vllm:lora_requests_info{max_lora="2",running_lora_adapters="a",waiting_lora_adapters=""} 5.0
vllm:lora_requests_info{max_lora="2",running_lora_adapters="a,b",waiting_lora_adapters="c"} 6.0
nonsense
vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",sleep_state="discard_all"} 0.0
"#;
        let told = read(text);
        assert!(!told.asleep);
        assert_eq!((told.running, told.waiting, told.kv_tokens, told.started_s), (5.0, 1.0, 1600, 1.7e9));
        assert!((told.kv_usage - 0.4).abs() < 1e-9);
        assert_eq!(told.offloaded, OffloadedBlocks { dram: Some(42), nvme: Some(7) });
        assert_eq!(told.adapters, Some((2, vec!["a".to_owned(), "b".to_owned()], vec!["c".to_owned()])));
        assert_eq!(read(&text.replace('\n', " 1712345678000\n")), told);
        let asleep = text.replace("\"discard_all\"} 0.0", "\"discard_all\"} 1.0");
        assert!(read(&asleep).asleep);
        assert_eq!(label("mamba_block_size=\"None\",block_size=\"16\"", "block_size"), Some("16"));
    }

    #[test]
    fn sglangs_metrics_are_read() {
        let text = r#"sglang:num_running_reqs{model_name="m } {"} 20.0
sglang:num_queue_reqs{model_name="m"} 4.0
sglang:token_usage{model_name="m"} 0.25 1712345678000
sglang:max_total_num_tokens{model_name="m"} 4096.0
"#;
        let told = read(text);
        assert_eq!(told.offloaded, OffloadedBlocks::default(), "there are no such tiers");
        assert_eq!((told.running, told.waiting, told.kv_tokens), (20.0, 4.0, 4096));
        assert!((told.kv_usage - 0.25).abs() < 1e-9);
    }
}
