//! `/metrics`, in Prometheus's text format: gathered when asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::Service;

/// How long questions took.
#[derive(Debug)]
pub struct Asked {
    seconds: Histogram,
}

impl Default for Asked {
    fn default() -> Self {
        let bounds = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5];
        Self { seconds: Histogram::new(bounds) }
    }
}

impl Asked {
    /// One question more.
    pub fn add(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}

fn number(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<u64, AtomicU64>::default();
    gauge.inner().store(value, Ordering::Relaxed);
    registry.register(name, help, gauge);
}

fn count(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

type Labelled = Family<Vec<(String, String)>, Gauge<u64, AtomicU64>>;

pub(super) async fn show(State(service): State<Arc<Service>>) -> Response {
    let mut registry = Registry::with_prefix("kvcellar_index");
    registry.register("score_seconds", "Time to answer a question", service.asked.seconds.clone());
    {
        let writer = service.index.write();
        let (blocks, sets) = writer.sizes();
        let counts = writer.counts();
        number(&mut registry, "blocks", "Different blocks with a holder", blocks as u64);
        number(&mut registry, "holder_sets", "Different sets of holders", sets as u64);
        number(&mut registry, "orphans", "Blocks that wait for their parent", writer.orphans() as u64);
        number(&mut registry, "memory_bytes", "Bytes that grow with blocks", writer.bytes() as u64);
        number(&mut registry, "memory_bytes_max", "Their bound", writer.bytes_max() as u64);
        count(&mut registry, "batches", "Batches applied", counts.batches);
        count(&mut registry, "blocks_stored", "Blocks told as stored", counts.stored);
        count(&mut registry, "blocks_removed", "Blocks told as removed", counts.removed);
        count(&mut registry, "removals_unmatched", "Removals of blocks that were not held", counts.unmatched);
        count(&mut registry, "engines_cleared", "Clears of engines", counts.cleared);
        count(&mut registry, "events_skipped", "Events that were not understood", counts.skipped);
        count(&mut registry, "blocks_orphaned", "Blocks that came before their parent", counts.orphaned);
        count(&mut registry, "orphans_adopted", "Orphans whose parent came", counts.adopted);
        count(&mut registry, "orphans_dropped", "Orphans dropped at the bound", counts.orphans_dropped);
        count(&mut registry, "blocks_refused", "Blocks left out at the memory bound", counts.refused);
        count(&mut registry, "blocks_unbridged", "Blocks of a size that does not go with the index", counts.unbridged);
    }
    let cut: Family<Vec<(String, String)>, Counter> = Family::default();
    for (reason, count) in service.clients.cuts().filter(|(_, count)| *count > 0) {
        cut.get_or_create(&vec![("reason".to_owned(), reason.to_owned())]).inc_by(count);
    }
    registry.register("clients_cut", "Connections ended because of their client, by reason", cut);
    number(&mut registry, "client_connections", "Connections of clients that are open", service.clients.open());
    let (connected, live, gaps) = (Labelled::default(), Labelled::default(), Labelled::default());
    let age = Labelled::default();
    for (name, source) in service.fleet.sources() {
        let heard = source.heard.unwrap_or(source.since).elapsed().as_secs();
        age.get_or_create(&vec![("source".to_owned(), name.clone())]).set(heard);
        let up = connected.get_or_create(&vec![("source".to_owned(), name)]).set(source.connected.into());
        debug_assert!(up <= 1);
        for stream in source.streams {
            let labels = vec![("engine".to_owned(), stream.engine)];
            live.get_or_create(&labels).set(stream.live.into());
            gaps.get_or_create(&labels).set(stream.counts.gaps);
        }
    }
    registry.register("source_connected", "The line to a source is up", connected);
    registry.register("source_silence", "Seconds since a source's last events, or its line's last change", age);
    registry.register("engine_live", "No event of the engine is missing", live);
    registry.register("engine_gaps", "Times an engine was forgotten because events were lost", gaps);
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        return super::refuse(StatusCode::INTERNAL_SERVER_ERROR, "metrics could not be written");
    }
    ([(header::CONTENT_TYPE, super::METRICS_TYPE)], text).into_response()
}
