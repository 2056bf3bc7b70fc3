"""Fields of vLLM's configuration, and variables of its environment, that do not change the bytes of a token's KV.

Everything that is *not* named here is part of the namespace: a field that a new vLLM brings costs hits until somebody
has looked at it, and never a token. So a line may be added only with a reason, and the reason must hold whatever the
field's value is.

`FIELDS` names ``Class.field``; a name holds for subclasses and wherever the class occurs (a draft model has a
`ModelConfig`, too). `VARIABLES` and `VARIABLE_PREFIXES` name variables of the environment.
"""

_WHERE = "where the model lies; what lies there counts, by content (weights.py)"
_TOKENS = "makes token ids or text of them; blocks are named by token ids"
_SAMPLING = "chooses tokens from logits; KV follows from the tokens chosen"
_BATCHING = "which requests are computed together, and when; the same within one process from step to step"
_ROOM = "how much KV cache there is, not what is in it"
_PLACE = "which process, machine, port or device does the work"
_WATCHING = "logs, metrics, traces and profiles"
_LAUNCH = "how the same kernels are launched"
_SPEED = "how fast weights are read"
_LIMIT = "what is refused or waited for"
_MEDIA_STORE = "where media and their processed form are kept or fetched; they are named by content"
_COMPILED = "what compiling left behind"
_SAME_BYTES = "where weights are kept between uses; the same bytes come back"
_RESULT = "taken in another form"

FIELDS: dict[str, str] = {
    # -- the whole
    # ---------------------------------------------------------------------------------------------------
    "VllmConfig.instance_id": "a number of this start",
    "VllmConfig.observability_config": _WATCHING,
    "VllmConfig.logging_config": _WATCHING,
    "VllmConfig.profiler_config": _WATCHING,
    "VllmConfig.kv_events_config": _WATCHING,
    "VllmConfig.kv_transfer_config": f"{_RESULT}: transfer.py",
    "VllmConfig.structured_outputs_config": _SAMPLING,
    "VllmConfig.reasoning_config": _SAMPLING,
    "VllmConfig.watermark_config": _SAMPLING,
    "VllmConfig.offload_config": _SAME_BYTES,
    "VllmConfig.weight_transfer_config": "how new weights come; after that nothing of before is used",
    "VllmConfig.shutdown_timeout": _LIMIT,
    "VllmConfig.aux_output_config": "what is returned beside the tokens",
    # -- the model
    # ---------------------------------------------------------------------------------------------------
    "ModelConfig.model": _WHERE,
    "ModelConfig.model_weights": _WHERE,
    "ModelConfig.revision": _WHERE,
    "ModelConfig._hf_config_revision": _WHERE,
    "ModelConfig.hf_config_path": "where the model's configuration lies; it counts itself, as hf_config",
    "ModelConfig.hf_token": "who downloads",
    "ModelConfig.tokenizer": _TOKENS,
    "ModelConfig.tokenizer_mode": _TOKENS,
    "ModelConfig.tokenizer_revision": _TOKENS,
    "ModelConfig.skip_tokenizer_init": _TOKENS,
    "ModelConfig.served_model_name": "what clients call it",
    "ModelConfig.generation_config": _SAMPLING,
    "ModelConfig.override_generation_config": _SAMPLING,
    "ModelConfig.logits_processors": _SAMPLING,
    "ModelConfig.max_logprobs": _SAMPLING,
    "ModelConfig.logprobs_mode": _SAMPLING,
    "ModelConfig.use_fp64_gumbel": _SAMPLING,
    "ModelConfig.return_sampling_mask": _SAMPLING,
    "ModelConfig.seed": "of sampling; where it makes the weights (dummy) it counts as those (weights.py)",
    "ModelConfig.max_model_len": f"{_RESULT}: facts.py takes the length that the model was built for",
    "ModelConfig.original_max_model_len": f"{_RESULT}: facts.py takes the length that the model was built for",
    "ModelConfig.enforce_eager": "its effect is CompilationConfig.mode, which counts",
    "ModelConfig.allowed_local_media_path": _LIMIT,
    "ModelConfig.allowed_media_domains": _LIMIT,
    "ModelConfig.allow_deprecated_quantization": _LIMIT,
    "ModelConfig.enable_sleep_mode": _SAME_BYTES,
    "ModelConfig.sleep_mode_backend": _SAME_BYTES,
    "ModelConfig.sleep_mode_offload_cudagraph": _SAME_BYTES,
    "ModelConfig.sleep_preserve_parameter_names": _SAME_BYTES,
    "ModelConfig.enable_cumem_allocator": _SAME_BYTES,
    "ModelConfig.enable_nccl_comm_suspend": _SAME_BYTES,
    "ModelConfig.renderer_num_workers": _BATCHING,
    "ModelConfig.pooler_config": "what is made of hidden states after the last layer",
    "ModelConfig._pooler_config_sources": _WATCHING,
    "ModelConfig.io_processor_plugin": _TOKENS,
    "ModelConfig.config_updated": "that vLLM has looked at its own configuration",
    # -- the model's own configuration, as transformers keeps it
    # -----------------------------------------------------
    "PreTrainedConfig._name_or_path": _WHERE,
    "PretrainedConfig._name_or_path": _WHERE,
    "PreTrainedConfig._commit_hash": _WHERE,
    "PretrainedConfig._commit_hash": _WHERE,
    "PreTrainedConfig.transformers_version": "the installed version counts (facts.py)",
    "PretrainedConfig.transformers_version": "the installed version counts (facts.py)",
    # -- the KV cache
    # ------------------------------------------------------------------------------------------------
    "CacheConfig.gpu_memory_utilization": _ROOM,
    "CacheConfig.num_gpu_blocks_override": _ROOM,
    "CacheConfig.num_gpu_blocks": _ROOM,
    "CacheConfig.num_cpu_blocks": _ROOM,
    "CacheConfig.kv_cache_memory_bytes": _ROOM,
    "CacheConfig.kv_cache_size_tokens": _ROOM,
    "CacheConfig.kv_cache_max_concurrency": _ROOM,
    "CacheConfig.kv_offloading_size": _ROOM,
    "CacheConfig.swap_space": _ROOM,
    "CacheConfig.cpu_offload_gb": _SAME_BYTES,
    "CacheConfig.cpu_kvcache_space_bytes": _ROOM,
    "CacheConfig.user_specified_block_size": "the block size itself counts",
    "CacheConfig._block_size_resolved": "the block size itself counts",
    "CacheConfig.enable_prefix_caching": "whether vLLM looks blocks up, not what they hold",
    "CacheConfig.prefix_cache_retention_interval": "which blocks vLLM itself keeps",
    # -- ranks
    # -------------------------------------------------------------------------------------------------------
    "ParallelConfig.data_parallel_size_local": _PLACE,
    "ParallelConfig.data_parallel_rank": _PLACE,
    "ParallelConfig.data_parallel_rank_local": _PLACE,
    "ParallelConfig.data_parallel_index": _PLACE,
    "ParallelConfig.data_parallel_master_ip": _PLACE,
    "ParallelConfig.data_parallel_rpc_port": _PLACE,
    "ParallelConfig.data_parallel_master_port": _PLACE,
    "ParallelConfig._data_parallel_master_port_list": _PLACE,
    "ParallelConfig._coord_store_port": _PLACE,
    "ParallelConfig.data_parallel_backend": _PLACE,
    "ParallelConfig.data_parallel_external_lb": _PLACE,
    "ParallelConfig.data_parallel_hybrid_lb": _PLACE,
    "ParallelConfig.dp_sync_interval": _BATCHING,
    "ParallelConfig._api_process_count": _PLACE,
    "ParallelConfig._api_process_rank": _PLACE,
    "ParallelConfig.master_addr": _PLACE,
    "ParallelConfig.master_port": _PLACE,
    "ParallelConfig.node_rank": _PLACE,
    "ParallelConfig.rank": _PLACE,
    "ParallelConfig.numa_bind": _PLACE,
    "ParallelConfig.numa_bind_nodes": _PLACE,
    "ParallelConfig.numa_bind_cpus": _PLACE,
    "ParallelConfig.assigned_physical_gpu_ids": _PLACE,
    "ParallelConfig.placement_group": _PLACE,
    "ParallelConfig.ray_runtime_env": _PLACE,
    "ParallelConfig.ray_workers_use_nsight": _WATCHING,
    "ParallelConfig.distributed_executor_backend": _PLACE,
    "ParallelConfig.distributed_timeout_seconds": _LIMIT,
    "ParallelConfig.cpu_distributed_timeout_seconds": _LIMIT,
    "ParallelConfig.max_parallel_loading_workers": _SPEED,
    "ParallelConfig.disable_nccl_for_dp_synchronization": "how ranks agree on a step's size",
    "ParallelConfig.enable_fault_tolerance": _LIMIT,
    "ParallelConfig.fault_tolerance_config": _LIMIT,
    "EPLBConfig.log_balancedness": _WATCHING,
    "EPLBConfig.log_balancedness_interval": _WATCHING,
    # -- the scheduler
    # -----------------------------------------------------------------------------------------------
    "SchedulerConfig.max_num_batched_tokens": _BATCHING,
    "SchedulerConfig.max_num_scheduled_tokens": _BATCHING,
    "SchedulerConfig.max_num_seqs": _BATCHING,
    "SchedulerConfig.max_num_active_seqs": _BATCHING,
    "SchedulerConfig.max_num_partial_prefills": _BATCHING,
    "SchedulerConfig.max_long_partial_prefills": _BATCHING,
    "SchedulerConfig.long_prefill_token_threshold": _BATCHING,
    "SchedulerConfig.long_prefill_token_threshold_adaptive": _BATCHING,
    "SchedulerConfig.max_num_queued_reqs": _LIMIT,
    "SchedulerConfig.max_num_queued_tokens": _LIMIT,
    "SchedulerConfig.enable_chunked_prefill": _BATCHING,
    "SchedulerConfig.max_num_encoder_input_tokens": _BATCHING,
    "SchedulerConfig.encoder_cache_size": _BATCHING,
    "SchedulerConfig.policy": _BATCHING,
    "SchedulerConfig.scheduler_reserve_full_isl": _BATCHING,
    "SchedulerConfig.watermark": _BATCHING,
    "SchedulerConfig.prefill_schedule_interval": _BATCHING,
    "SchedulerConfig.async_scheduling": _BATCHING,
    "SchedulerConfig.stream_interval": "how often clients hear of new tokens",
    # -- loading
    # -----------------------------------------------------------------------------------------------------
    "LoadConfig.download_dir": _WHERE,
    "LoadConfig.safetensors_load_strategy": _SPEED,
    "LoadConfig.safetensors_prefetch_num_threads": _SPEED,
    "LoadConfig.safetensors_prefetch_block_size": _SPEED,
    "LoadConfig.use_tqdm_on_load": _WATCHING,
    "LoadConfig.pt_load_map_location": _PLACE,
    # -- adapters
    # ----------------------------------------------------------------------------------------------------
    "LoRAConfig.max_loras": "how many adapters are loaded at a time; each counts by content (adapters.py)",
    "LoRAConfig.max_cpu_loras": "how many adapters are loaded at a time; each counts by content (adapters.py)",
    "LoRAConfig.max_lora_rank": "room for adapters; what an adapter leaves empty is zero",
    # -- media
    # -------------------------------------------------------------------------------------------------------
    "MultiModalConfig.limit_per_prompt": _LIMIT,
    "MultiModalConfig.mm_processor_cache_gb": _MEDIA_STORE,
    "MultiModalConfig.mm_processor_cache_type": _MEDIA_STORE,
    "MultiModalConfig.mm_shm_cache_max_object_size_mb": _MEDIA_STORE,
    "MultiModalConfig.mm_tensor_ipc": _MEDIA_STORE,
    "MultiModalConfig.mm_ipc_gpu_memory_gb": _ROOM,
    "MultiModalConfig.skip_mm_profiling": _ROOM,
    "MultiModalConfig.mm_encoder_fp8_scale_save_path": "what is written for later starts",
    "MultiModalConfig.mm_encoder_fp8_scale_save_margin": "what is written for later starts",
    # -- drafts
    # ------------------------------------------------------------------------------------------------------
    "SpeculativeConfig.model": f"{_WHERE}; as draft_model_config",
    "SpeculativeConfig.revision": _WHERE,
    "SpeculativeConfig.target_model_config": "the model itself, which counts",
    "SpeculativeConfig.target_parallel_config": "the model's ranks, which count",
    # -- compiling
    # ---------------------------------------------------------------------------------------------------
    "CompilationConfig.cache_dir": _COMPILED,
    "CompilationConfig.local_cache_dir": _COMPILED,
    "CompilationConfig.compile_cache_save_format": _COMPILED,
    "CompilationConfig.debug_dump_path": _WATCHING,
    "CompilationConfig.traced_files": _COMPILED,
    "CompilationConfig.compilation_time": _COMPILED,
    "CompilationConfig.encoder_compilation_time": _COMPILED,
    "CompilationConfig.enabled_custom_ops": f"{_COMPILED}; custom_ops counts",
    "CompilationConfig.disabled_custom_ops": f"{_COMPILED}; custom_ops counts",
    "CompilationConfig.static_forward_context": "the layers themselves; their attention counts (facts.py)",
    "CompilationConfig.static_all_moe_layers": "names of the layers themselves",
    "CompilationConfig.compile_ranges_endpoints": f"follows from {_BATCHING}",
    "CompilationConfig.cudagraph_mode": _LAUNCH,
    "CompilationConfig.cudagraph_capture_sizes": _LAUNCH,
    "CompilationConfig.max_cudagraph_capture_size": _LAUNCH,
    "CompilationConfig.cudagraph_num_of_warmups": _LAUNCH,
    "CompilationConfig.cudagraph_copy_inputs": _LAUNCH,
    "CompilationConfig.cudagraph_specialize_lora": _LAUNCH,
    "CompilationConfig.cudagraph_decoder_replay": _LAUNCH,
    "CompilationConfig.decoder_replay_cudagraph_capture_sizes": _LAUNCH,
    "CompilationConfig.bs_to_padded_graph_size": _LAUNCH,
    "CompilationConfig.cudagraph_mm_encoder": _LAUNCH,
    "CompilationConfig.encoder_cudagraph_token_budgets": _LAUNCH,
    "CompilationConfig.encoder_cudagraph_max_vision_items_per_batch": _LAUNCH,
    "CompilationConfig.encoder_cudagraph_max_frames_per_batch": _LAUNCH,
    # -- kernels
    # -----------------------------------------------------------------------------------------------------
    "KernelConfig.enable_cutedsl_warmup": "what is compiled before serving",
    "KernelConfig.enable_jit_warmup": "what is compiled before serving",
}

VARIABLES: dict[str, str] = {
    "VLLM_API_KEY": "who may ask",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": f"{_LIMIT}; the length itself counts",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _LIMIT,
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "how processes talk",
    "VLLM_ASSETS_CACHE": _MEDIA_STORE,
    "VLLM_ASSETS_CACHE_MODEL_CLEAN": _MEDIA_STORE,
    "VLLM_CACHE_ROOT": _COMPILED,
    "VLLM_CONFIG_ROOT": _WATCHING,
    "VLLM_COMPILE_CACHE_SAVE_FORMAT": _COMPILED,
    "VLLM_CPU_KVCACHE_SPACE": _ROOM,
    "VLLM_CPU_NUM_OF_RESERVED_CPU": _PLACE,
    "VLLM_CPU_OMP_THREADS_BIND": _PLACE,
    "VLLM_DEBUG_DUMP_PATH": _WATCHING,
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": _WATCHING,
    "VLLM_DEBUG_MFU_METRICS": _WATCHING,
    "VLLM_DEBUG_WORKSPACE": _WATCHING,
    "VLLM_DISABLE_COMPILE_CACHE": _COMPILED,
    "VLLM_DIST_IDENT": "a name that the CPU worker draws at each start",
    "VLLM_DISABLE_LOG_LOGO": _WATCHING,
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "what requests are called",
    "VLLM_DO_NOT_TRACK": _WATCHING,
    "VLLM_DP_MASTER_IP": _PLACE,
    "VLLM_DP_MASTER_PORT": _PLACE,
    "VLLM_DP_RANK": _PLACE,
    "VLLM_DP_RANK_LOCAL": _PLACE,
    "VLLM_DP_SIZE": f"{_RESULT}: ParallelConfig.data_parallel_size counts",
    "VLLM_ENABLE_V1_MULTIPROCESSING": _PLACE,
    "VLLM_ENGINE_READY_TIMEOUT_S": _LIMIT,
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": _LIMIT,
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": _COMPILED,
    "VLLM_FORCE_AOT_LOAD": _COMPILED,
    "VLLM_GC_DEBUG": _WATCHING,
    "VLLM_GPU_SYNC_CHECK": _WATCHING,
    "VLLM_HOST_IP": _PLACE,
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": _LIMIT,
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": _LIMIT,
    "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": "how events write hashes",
    "VLLM_LOOPBACK_IP": _PLACE,
    "VLLM_NO_USAGE_STATS": _WATCHING,
    "VLLM_PORT": _PLACE,
    "VLLM_PROCESS_NAME_PREFIX": _WATCHING,
    "VLLM_RAY_BUNDLE_INDICES": _PLACE,
    "VLLM_RINGBUFFER_WARNING_INTERVAL": _WATCHING,
    "VLLM_RPC_BASE_PATH": _PLACE,
    "VLLM_SERVER_DEV_MODE": _LIMIT,
    "VLLM_SYSTEM_START_DATE": _TOKENS,
    "VLLM_TRACE_FUNCTION": _WATCHING,
    "VLLM_USAGE_SOURCE": _WATCHING,
    "VLLM_USAGE_STATS_SERVER": _WATCHING,
    "VLLM_USE_FASTOKENS": _TOKENS,
    "VLLM_USE_FLASHINFER_SAMPLER": _SAMPLING,
    "VLLM_USE_MODELSCOPE": _WHERE,
    "VLLM_USE_RUST_FRONTEND": _PLACE,
    "VLLM_RUST_FRONTEND_PATH": _PLACE,
    "VLLM_WORKER_MULTIPROC_METHOD": _PLACE,
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": _LIMIT,
    "VLLM_XGRAMMAR_CACHE_MB": _SAMPLING,
    "VLLM_V1_USE_OUTLINES_CACHE": _SAMPLING,
    "VLLM_MODEL_REDIRECT_PATH": _WHERE,
    "VLLM_MSGPACK_ZERO_COPY_THRESHOLD": "how processes talk",
    "VLLM_MQ_MAX_CHUNK_BYTES_MB": "how processes talk",
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME": "how processes talk",
}

VARIABLE_PREFIXES: dict[str, str] = {
    "VLLM_LOGGING_": _WATCHING,
    "VLLM_CONFIGURE_LOGGING": _WATCHING,
    "VLLM_LOG_": _WATCHING,
    "VLLM_NVTX_": _WATCHING,
    "VLLM_CUSTOM_SCOPES_": _WATCHING,
    "VLLM_MEDIA_CACHE": _MEDIA_STORE,
    "VLLM_MEDIA_FETCH_": _MEDIA_STORE,
    "VLLM_IMAGE_FETCH_": _LIMIT,
    "VLLM_VIDEO_FETCH_": _LIMIT,
    "VLLM_AUDIO_FETCH_": _LIMIT,
    "VLLM_NIXL_": _PLACE,
    "VLLM_P2P_": _PLACE,
    "VLLM_EC_SIDE_": _PLACE,
    "VLLM_MOONCAKE_": _PLACE,
    "VLLM_LORA_RESOLVER_": "where adapters come from; each counts by content (adapters.py)",
    "VLLM_MAX_N_": _LIMIT,
    "VLLM_MAX_COMPLETION_": _LIMIT,
    "VLLM_MAX_STOP_": _LIMIT,
    "VLLM_TOOL_": _SAMPLING,
    "VLLM_BUILD_": "of how vLLM was built; its version counts",
    "VLLM_IMAGE_TAG": "of how vLLM was built; its version counts",
    "VLLM_CI_": "of vLLM's own tests",
}

# Variables of others than vLLM that change how it computes.
OTHERS_THAT_COUNT: dict[str, str] = {
    "NVIDIA_TF32_OVERRIDE": "float32 products with fewer bits",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "float32 products with fewer bits",
    "ONEDNN_DEFAULT_FPMATH_MODE": "float32 products with fewer bits",
    "DNNL_DEFAULT_FPMATH_MODE": "float32 products with fewer bits",
    "PYTHONHASHSEED": "the root of vLLM's block hashes",
}


def is_neutral(variable: str) -> bool:
    """Whether a variable of vLLM's environment leaves KV alone."""
    return variable in VARIABLES or variable.startswith(tuple(VARIABLE_PREFIXES))
