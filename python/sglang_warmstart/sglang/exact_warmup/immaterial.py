"""What of a launch does not matter for its kernels: arguments of SGLang, and environment variables, by name.

Why these lists say what does not matter, and not what does: :mod:`.launch`. This module imports next to nothing, since
`sglang-warmstart run` needs it before a server has started.
"""

from __future__ import annotations

import fnmatch

_PLACES = """
    model_path revision tokenizer_path speculative_draft_model_path speculative_draft_model_revision lora_paths
    uno_lora_path download_dir file_storage_path crash_dump_folder decrypted_config_file decrypted_draft_config_file
    export_metrics_to_file export_metrics_to_file_dir debug_tensor_dump_input_file debug_tensor_dump_output_folder
    modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path kt_weight_path
    lmcache_config_file flexkv_config_file spec_trace_dir ple_offload_dir speculative_ngram_external_corpus_path
    init_expert_location speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path
"""
# Which processors, network cards and ports; which processes of a server these are; and what is drawn at random.
_THIS_MACHINE = """
    host port nccl_port dist_init_addr node_rank base_gpu_id gpu_id_step numa_node random_seed mooncake_ib_device
    disaggregation_ib_device disaggregation_bootstrap_port engine_info_bootstrap_port encoder_bootstrap_port
    encoder_urls encoder_register_urls remote_instance_weight_loader_seed_instance_ip
    remote_instance_weight_loader_seed_instance_service_port remote_instance_weight_loader_send_weights_group_ports
    grpc_port grpc_http_sidecar_port smg_http_sidecar_port gated_launch_port forward_pass_metrics_ipc_name
    forward_pass_metrics_worker_id decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank
    load_publish_endpoint weight_cache_socket mem_fraction_static max_total_tokens
"""
_HOW_WEIGHTS_ARE_READ = """
    load_format model_loader_extra_config model_checksum custom_weight_loader delete_ckpt_after_loading
    checkpoint_engine_wait_weights_before_ready weight_loader_disable_mmap weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load remote_instance_weight_loader_backend
    remote_instance_weight_loader_start_seed_via_transfer_engine modelexpress_config startup_weight_load_mode
    weight_cache_mode weight_cache_timeout weight_version
"""
_WHO_MAY_ASK = """
    api_key admin_api_key ssl_keyfile ssl_certfile ssl_ca_certs ssl_keyfile_password enable_ssl_refresh enable_http2
    http2_initial_connection_window_size http2_max_concurrent_streams enable_http_worker_reuseport grpc_mode
    smg_grpc_mode grpc_worker_threads grpc_response_timeout_secs fastapi_root_path served_model_name
    allowed_media_domains media_url_max_file_size_mb trust_remote_code trust_request_chat_template
    trust_mm_content_hashes tool_server sidecar sidecar_args watermark_config
    watermark_key watermark_key_b
"""
_WHAT_IS_TOLD = """
    log_level log_level_http log_requests log_requests_level log_requests_format log_requests_target show_time_cost
    uvicorn_access_log_exclude_prefixes decode_log_interval gc_threshold gc_warning_threshold_secs enable_metrics
    enable_mfu_metrics enable_metrics_for_all_schedulers enable_forward_pass_metrics extra_metric_labels stat_loggers
    tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels bucket_time_to_first_token
    bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
    enable_request_time_stats_logging enable_cache_report kv_events_config enable_trace trace_modules
    otlp_traces_endpoint otlp_service_name load_snapshot_publish_interval
"""
_BEFORE_AND_AFTER_THE_MODEL = """
    tokenizer_mode tokenizer_backend tokenizer_worker_num detokenizer_worker_num skip_tokenizer_init chat_template
    hf_chat_template_name completion_template default_chat_template_kwargs reasoning_parser tool_call_parser
    strip_thinking_cache enable_strict_thinking sampling_defaults preferred_sampling_params grammar_backend
    constrained_json_whitespace_pattern constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
    disable_outlines_disk_cache stream_interval batch_notify_size stream_response_default_include_usage
    incremental_streaming_output enable_streaming_session enable_response_store allow_auto_truncate
    enable_tokenizer_batch_encode disable_tokenizer_batch_decode enable_dynamic_batch_tokenizer
    dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
"""
_WHO_WAITS_HOW_LONG = """
    skip_server_warmup warmups watchdog_timeout soft_watchdog_timeout dist_timeout sleep_on_idle custom_sigquit_handler
    max_queued_requests schedule_policy enable_priority_scheduling disable_priority_preemption default_priority_value
    abort_on_priority_when_disabled schedule_low_priority_values_first priority_scheduling_preemption_threshold
    load_balance_method hicache_ratio hicache_size hicache_host_memory_fraction hicache_storage_backend_extra_config
    unified_cache_external_linker_config
"""
_LISTS = (
    *(_PLACES, _THIS_MACHINE, _HOW_WEIGHTS_ARE_READ, _WHO_MAY_ASK, _WHAT_IS_TOLD),
    *(_BEFORE_AND_AFTER_THE_MODEL, _WHO_WAITS_HOW_LONG),
)
IMMATERIAL_ARGUMENTS = frozenset(name for names in _LISTS for name in names.split())

# Read by SGLang under names of their own.
_FURTHER_VARIABLES = ("USE_TRITON_W8A8_FP8_KERNEL", "DEEP_NORMAL_MODE_USE_INT8_QUANT")

# Patterns: what compiles, watches or restores, and what is as in the lists above.
_VARIABLES = """
    SGLANG_WARMSTART* SGLANG_PLUGINS SGLANG_JIT_DEEPGEMM_* SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP SGLANG_DG_*
    SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE SGLANG_JIT_CACHE_* SGLANG_JIT_LOG_* SGLANG_CRASH_ON_* SGLANG_USE_MODELSCOPE
    SGLANG_*_DIR SGLANG_*CONFIG_PATH SGLANG_NCCL_SO_PATH SGLANG_CACHE_ROOT SGLANG_*_PORT SGLANG_*_PORT_* SGLANG_*_IP
    SGLANG_LOCAL_IP_NIC SGLANG_*_URL SGLANG_*_PID SGLANG_RUN_ID SGLANG_TP_RANK SGLANG_DP_RANK
    SGLANG_IS_FIRST_RANK_ON_NODE SGLANG_BLOCK_NONZERO_RANK_CHILDREN SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE
    SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS SGLANG_CPU_OMP_THREADS_BIND SGLANG_SET_CPU_AFFINITY SGLANG_*NUMA*
    SGLANG_SORT_WEIGHT_FILES SGLANG_PREFETCH_* SGLANG_*TIMEOUT* SGLANG_*_INTERVAL SGLANG_LOG_* SGLANG_*_LOG
    SGLANG_LOGGING_* SGLANG_TRACE_* SGLANG_OTLP_* SGLANG_PROFILE_* SGLANG_NSYS_* SGLANG_*METRICS*
    SGLANG_CUDA_COREDUMP* SGLANG_RECORD_STEP_TIME SGLANG_TEST_* SGLANG_SKIP_*_CHECK SGLANG_OLLAMA_* SGLANG_HEALTH_*
    SGLANG_ENABLE_HEALTH_* SGLANG_GRAMMAR_* SGLANG_DISABLE_OUTLINES_DISK_CACHE SGLANG_TOOL_* SGLANG_EXA_*
    *_API_KEY *SECRET* *PASSWORD*
"""
IMMATERIAL_VARIABLES = tuple(_VARIABLES.split())


def is_material(variable: str) -> bool:
    """Whether an environment variable may decide which GEMMs there are."""
    if not variable.startswith("SGLANG_") and variable not in _FURTHER_VARIABLES:
        return False
    return not any(fnmatch.fnmatchcase(variable, pattern) for pattern in IMMATERIAL_VARIABLES)
