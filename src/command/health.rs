//! The picker's gRPC health service: whether it is alive, and whether it can send a request
//! anywhere.

use std::convert::Infallible;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Asked by those who would restart the picker.
const LIVENESS: &str = "liveness";

/// Asked by gateways and charts before they send requests, each by another name.
const READINESS: [&str; 4] = ["", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor"];

/// How often it is looked whether an engine is usable.
const EVERY: Duration = Duration::from_millis(500);

/// Keeps the answers true, for ever.
pub async fn keep(health: &HealthReporter, is_ready: impl Fn() -> bool) -> Infallible {
    health.set_service_status(LIVENESS, ServingStatus::Serving).await;
    loop {
        let status = if is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in READINESS {
            health.set_service_status(name, status).await;
        }
        tokio::time::sleep(EVERY).await;
    }
}
