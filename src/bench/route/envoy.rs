//! Envoy in front of engines: one way to a fixed engine, one by the router's picker.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};

use super::process::{Process, answers, dead};
use kvcellar_block::error::Result;

/// An Envoy with two ways to engines: one fixed, one by the picker.
#[derive(Debug)]
pub(super) struct Envoy {
    pub(super) process: Process,
    pub(super) fixed: String,
    pub(super) picked: String,
}

impl Envoy {
    /// Starts one and waits until it is ready.
    ///
    /// # Errors
    /// [`kvcellar_block::error::Error::DeviceDead`].
    pub(super) async fn start(binary: &Path, engine: u16, picker: u16) -> Result<Self> {
        const NAME: &str = "Envoy";
        let [admin, fixed, picked] = [free_port()?, free_port()?, free_port()?];
        let config = config(admin, fixed, picked, engine, picker).to_string();
        let mut command = Command::new(binary);
        command.args(["--use-dynamic-base-id", "--concurrency", "1", "-l", "error", "--config-yaml", &config]);
        let process = Process::start(NAME, command.stderr(Stdio::null()))?;
        answers(&format!("http://127.0.0.1:{admin}/ready"), |_| true, NAME, "it does not start").await?;
        let at = |port: u16| format!("http://127.0.0.1:{port}");
        Ok(Self { process, fixed: at(fixed), picked: at(picked) })
    }
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    Ok(listener.map_err(|error| dead("a port", error))?.port())
}

fn address(port: u16) -> Json {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": port}})
}

fn cluster(name: &str, port: u16) -> Json {
    let endpoint = json!({"endpoint": {"address": address(port)}});
    json!({"name": name, "type": "STATIC", "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}})
}

fn listener(name: &str, port: u16, filters: &[Json]) -> Json {
    const TYPES: &str =
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": name, "timeout": "60s"}}]);
    let manager = json!({"@type": TYPES, "stat_prefix": name, "http_filters": filters,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}});
    json!({"name": name, "address": address(port), "per_connection_buffer_limit_bytes": 32 << 20,
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}]})
}

fn config(admin: u16, fixed: u16, picked: u16, engine: u16, picker: u16) -> Json {
    let last = json!({"name": "envoy.filters.http.router",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}});
    let processor = json!({"name": "envoy.filters.http.ext_proc", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "60s"},
        "message_timeout": "10s", "mutation_rules": {"allow_all_routing": true},
        "processing_mode": {"request_header_mode": "SEND", "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED", "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND"}}});
    let mut grpc = cluster("picker", picker);
    let options = json!({"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}}});
    grpc["typed_extension_protocol_options"] =
        json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options});
    let engines = json!({"name": "picked", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "2s",
        "original_dst_lb_config": {"use_http_header": true, "http_header_name": "x-gateway-destination-endpoint"}});
    json!({"admin": {"address": address(admin)}, "static_resources": {
        "listeners": [listener("fixed", fixed, std::slice::from_ref(&last)), listener("picked", picked, &[processor, last.clone()])],
        "clusters": [cluster("fixed", engine), engines, grpc]}})
}
