"""SimpleTuner's options for its run file, each with one of four answers: works, alias, ignored, refused.

An option that this pipeline lacks is refused with a reason when it would change the training, unless its value switches
it off. It is accepted with any value, and reported as ignored, when it only controls how SimpleTuner runs, what it
shows or where it writes, or when it belongs to another kind of model.
"""

from dataclasses import dataclass


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


WORKS = _names(
    """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay aspect_bucket_alignment aspect_bucket_rounding
    attention_mechanism base_model_precision caption_dropout_probability checkpoint_step_interval
    checkpoints_total_limit controlnet data_backend_config data_backend_sampling dynamo_backend ema_decay
    eval_dataset_id gradient_accumulation_steps gradient_checkpointing huber_c huber_schedule init_lora
    input_perturbation input_perturbation_steps learning_rate lora_alpha lora_dropout lora_init_type lora_rank
    loss_type lr_end lr_num_cycles lr_power lr_scheduler lr_warmup_steps max_grad_norm max_train_steps mixed_precision
    model_family model_flavour model_type noise_offset noise_offset_probability num_eval_images num_train_epochs
    num_validation_images offset_noise optimizer optimizer_config pretrained_model_name_or_path report_to
    scheduled_sampling_max_step_offset scheduled_sampling_probability seed snr_gamma soft_min_snr_sigma_data
    timestep_bias_begin timestep_bias_end timestep_bias_multiplier timestep_bias_portion timestep_bias_strategy
    tokenizer_max_length train_batch_size use_dora use_ema use_soft_min_snr validation_guidance
    validation_negative_prompt validation_noise_scheduler validation_num_inference_steps validation_prompt
    validation_resolution validation_seed validation_step_interval
    """
)

# Their name, and ours. An older name of theirs is among them.
ALIASES = {
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_steps": "validation_step_interval",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "peft_lora_target_modules": "lora_target_modules",
    "text_encoder_batch_size": "embed_batch_size",
    "text_encoder_1_precision": "text_encoder_quantization",
    "torch_num_threads": "num_threads",
    "attention": "attention_mechanism",
    "use_gradient_checkpointing": "gradient_checkpointing",
}
# What stands for our key only at one value; at any other it asks for nothing.
SWITCHES: dict[str, tuple[object, str, object]] = {
    "layer_freeze_strategy": ("bitfit", "use_bitfit", True),
    "enable_xformers_memory_efficient_attention": (True, "attention_mechanism", "xformers"),
    "validation_disable": (True, "validation_step_interval", 0),
    "adam_bfloat16": (True, "optimizer", "adamw_bf16"),
    "use_8bit_adam": (True, "optimizer", "adamw_8bit"),
    "use_prodigy_optimizer": (True, "optimizer", "prodigy"),
    "use_adafactor_optimizer": (True, "optimizer", "adafactor"),
}
# Options that are keys of the table `[stage3]`, when the first is on.
STAGE3_KEYS = {
    "deepfloyd_validation_stage3_mode": "",
    "deepfloyd_validation_stage3_model": "pretrained_model_name_or_path",
    "deepfloyd_validation_stage3_guidance": "validation_guidance",
    "deepfloyd_validation_stage3_noise_level": "validation_noise_level",
}
# What the entries of the data file take where they do not say it themselves.
DATA_DEFAULTS = _names(
    """
    caption_strategy disable_multiline_split instance_prompt maximum_image_size minimum_image_size only_instance_prompt
    prepend_instance_prompt resolution resolution_type target_downsample_size
    """
)

_IGNORED = {
    "how or where SimpleTuner runs": """
        accelerate_config accelerate_extra_args accelerator_cache_clear_interval allow_tf32 aspect_bucket_worker_count
        aws_max_pool_connections configs_dir context_parallel_comm_strategy
        context_parallel_size deepspeed_config delete_model_after_load disable_tf32 disk_low_action disk_low_script
        disk_low_threshold dynamo_dynamic dynamo_fullgraph dynamo_mode dynamo_use_regional_compilation
        enable_group_offload enable_model_cpu_offload enable_multiprocessing find_unused_parameters
        fsdp_activation_checkpointing fsdp_auto_wrap_policy fsdp_cpu_offload fsdp_cpu_ram_efficient_loading fsdp_enable
        fsdp_limit_all_gathers fsdp_reshard_after_forward fsdp_state_dict_type fsdp_transformer_layer_cls_to_wrap
        fsdp_version fully_unload_text_encoder fuse_optimizer gradient_checkpointing_backend
        gradient_checkpointing_interval gradient_checkpointing_offload_attention
        gradient_checkpointing_offload_pin_memory_max_buckets gradient_checkpointing_offload_prefetch
        gradient_checkpointing_segment_stride group_offload_blocks_per_group
        group_offload_text_encoder group_offload_to_disk_path group_offload_type group_offload_use_stream
        group_offload_vae i_know_what_i_am_doing image_processing_batch_size local_rank machine_rank main_process_ip
        main_process_port max_workers merge_environment_config musubi_block_swap_device musubi_blocks_to_swap
        offload_during_save offload_during_startup offload_param_path optimizer_cpu_offload_method
        optimizer_offload_gradients optimizer_release_gradients quantize_via ramtorch ramtorch_controlnet
        ramtorch_disable_extensions ramtorch_disable_sync_hooks ramtorch_target_modules ramtorch_text_encoder
        ramtorch_text_encoder_percent ramtorch_transformer_percent ramtorch_vae read_batch_size sageattention_usage
        same_network seed_for_each_device set_grads_to_none sla_config tokenizers_parallelism trust_remote_code
        unet_attention_slice variant write_batch_size
        """,
    "pictures are listed, batched and kept in this pipeline's own way": """
        allow_dataset_oversubscription aspect_bucket_disable_rebuild cache_dir cache_dir_text cache_dir_vae
        cache_file_suffix compress_disk_cache conditioning_multidataset_sampling data_aesthetic_score
        dataloader_prefetch dataloader_prefetch_qlen debug_aspect_buckets debug_dataset_loader delete_errored_images
        delete_invalid_checkpoints delete_nsfw_images delete_problematic_images delete_small_images
        delete_unwanted_images disable_bucket_pruning ignore_missing_files
        metadata_update_interval override_dataset_config parquet_caption_column parquet_filename_column
        preserve_data_backend_cache print_filenames print_sampler_statistics skip_file_discovery text_cache_disable
        text_cache_ondemand text_embed_full_cache
        """,
    "a killed run resumes by itself, and its checkpoints change no result": """
        checkpoint_epoch_interval checkpointing_rolling_steps checkpointing_use_tempdir checkpoints_rolling_total_limit
        """,
    "mixed_precision and optimizer set the precision of weights and gradients": """
        base_model_default_dtype gradient_precision pure_bf16
        """,
    "each sample's timestep is drawn by itself; see timestep_bias_strategy": "disable_segmented_timestep_sampling",
    "gradients are scaled down to the norm max_grad_norm, which keeps their direction": "grad_clip_method",
    "an epoch's last batch may be short, and steps are counted from the batches": "ignore_final_epochs strict_epoch_limit",
    "artifacts lie in the workspace, and nothing is sent away": """
        custom_tracker enable_watermark hub_model_id logging_dir model_card_note model_card_private
        model_card_safe_for_work modelspec_comment output_dir post_checkpoint_script post_upload_script
        publishing_config push_checkpoints_to_hub push_to_hub push_to_hub_background tracker_image_layout
        tracker_project_name tracker_run_name webhook_config webhook_reporting_interval
        """,
    "samples and measures are those of this pipeline": """
        deepfloyd_validation_pipeline_mode deepfloyd_validation_stage1_guidance deepfloyd_validation_stage1_model
        deepfloyd_validation_stage1_num_inference_steps deepfloyd_validation_stage2_guidance
        deepfloyd_validation_stage2_model deepfloyd_validation_stage2_num_inference_steps
        disable_benchmark ema_validation eval_dataset_pooling
        eval_epoch_interval eval_loss_disable eval_steps_interval eval_timesteps evaluation_type
        inference_scheduler_timestep_spacing pretrained_evaluation_model_name_or_path user_prompt_library
        validate_after_epoch validate_after_step validation_adapter_config validation_adapter_mode
        validation_adapter_name validation_adapter_path validation_adapter_strength validation_disable_unconditional
        validation_epoch_interval validation_external_background validation_external_script validation_guidance_rescale
        validation_guidance_skip_layers validation_guidance_skip_layers_start validation_guidance_skip_layers_stop
        validation_guidance_skip_scale validation_image_format validation_image_quality validation_input
        validation_lycoris_strength validation_method validation_multigpu validation_on_startup
        validation_preview validation_preview_steps validation_prompt_library validation_randomize
        validation_seed_source validation_stitch_input_location validation_torch_compile validation_using_datasets
        """,
    "Stage III is off; at `deepfloyd_validation_stage3_mode = sd-x4-upscaler` these are the table `[stage3]`": """
        deepfloyd_validation_stage3_guidance deepfloyd_validation_stage3_mode deepfloyd_validation_stage3_model
        deepfloyd_validation_stage3_noise_level
        """,
    "IF works on pixels; there is no VAE": """
        crepa_drop_vae_encoder keep_vae_loaded pretrained_vae_model_name_or_path vae_batch_size
        vae_cache_clear_each_epoch vae_cache_disable vae_cache_ondemand vae_cache_preprocess vae_cache_scan_behaviour
        vae_dtype vae_enable_patch_conv vae_enable_slicing vae_enable_temporal_roll vae_enable_tiling vae_path
        """,
    "IF predicts epsilon; it is no flow-matching model": """
        audio_flow_schedule_shift flow_beta_schedule_alpha flow_beta_schedule_beta flow_cubic_schedule_weights
        flow_custom_timesteps flow_matching_loss flow_schedule_auto_shift flow_schedule_shift flow_sigmoid_scale
        flow_timesteps_mode flow_use_beta_schedule flow_use_uniform_schedule mixflow_gamma scheduled_sampling_order
        scheduled_sampling_reflexflow scheduled_sampling_reflexflow_alpha scheduled_sampling_reflexflow_beta1
        scheduled_sampling_reflexflow_beta2 scheduled_sampling_sampler training_scheduler_timestep_spacing
        """,
    "IF makes pictures, neither video nor audio": """
        audio_channels audio_duration_interval audio_max_duration_seconds audio_min_duration_seconds
        audio_truncation_mode framerate lyrics_embedder_lr lyrics_embedder_lr_scheduler lyrics_embedder_optimizer
        lyrics_embedder_train nsfw_check_video_frame_count nsfw_check_video_frame_selection
        nsfw_check_video_min_flagged_frames validation_audio_duration validation_audio_only validation_lyrics
        validation_num_video_frames
        """,
    "for another family of models": """
        acestep_lora_target assistant_lora_inference_strength assistant_lora_path assistant_lora_strength
        cosmos3_generator_component cosmos3_reasoner_component custom_text_encoder_intermediary_layers
        disable_assistant_lora enable_chunked_feed_forward feed_forward_chunk_size flux_attention_masked_training
        flux_fast_schedule flux_guidance_max flux_guidance_min flux_guidance_mode flux_guidance_value flux_lora_target
        fuse_qkv_projections fused_qkv_projections hidream_load_balancing_loss_weight hidream_use_load_balancing_loss
        ideogram_auto_json ideogram_fp8_base_upcast ideogram_load_unconditional_transformer
        ideogram_prompt_enhancer_head_id ideogram_prompt_upsample ideogram_schedule_mu ideogram_schedule_std
        ideogram_uncond_ramtorch ideogram_validation krea2_reference_latents ltx2_first_frame_conditioning_probability
        ltx2_intrinsic_conditioning ltx2_mask_conditioning_probability ltx2_prefix_conditioning_frames
        ltx2_prefix_conditioning_probability ltx2_reference_spatial_scale_factor ltx2_reference_temporal_scale_factor
        ltx2_suffix_conditioning_frames ltx2_suffix_conditioning_probability ltx2_validation_audio_guidance
        ltx2_validation_pipeline_mode ltx2_validation_spatial_upsampler_filename
        ltx2_validation_spatial_upsampler_model ltx_i2v_prob ltx_partial_noise_fraction ltx_protect_first_frame
        ltx_train_mode max_grounding_entities minimax_h3_reference_mode minimax_h3_sparse_attention
        minimax_h3_sparse_block_shape minimax_h3_sparse_share_heads minimax_h3_sparse_start_layer
        minimax_h3_sparse_video_kv_fraction minimax_h3_target_mode minimax_music_lm_adapter
        minimax_music_lm_adapter_strength minimax_music_lm_max_frames minimax_music_lm_precache_mode
        minimax_music_train_component pixart_validation_pipeline_mode pixart_validation_stage1_model
        pixart_validation_stage2_model pretrained_gemma_model_name_or_path pretrained_grounding_model_name_or_path
        pretrained_transformer_model_name_or_path pretrained_transformer_subfolder qwen_text_encoder_model_name_or_path
        sana_complex_human_instruction sd3_clip_uncond_behaviour sd3_t5_uncond_behaviour sdxl_refiner_uses_full_range
        sdxl_validation_pipeline_mode sdxl_validation_stage1_model sdxl_validation_stage2_model
        text_encoder_2_precision text_encoder_3_precision text_encoder_4_precision validation_guidance_real
        validation_ltx2_video_conditioning validation_no_cfg_until_timestep wan_force_2_1_time_embedding
        wan_validation_load_other_stage
        """,
    "only with an option that is refused here, or off": """
        crepa_adjacent_distance crepa_adjacent_tau crepa_block_index crepa_cumulative_neighbors crepa_cutoff_step
        crepa_decay_steps crepa_encoder crepa_encoder_frames_batch_size crepa_encoder_image_size crepa_feature_source
        crepa_lambda crepa_lambda_end crepa_model crepa_normalize_by_frames crepa_normalize_neighbour_sum crepa_power
        crepa_scheduler crepa_self_flow crepa_self_flow_mask_ratio crepa_similarity_ema_decay
        crepa_similarity_threshold crepa_spatial_align crepa_teacher_block_index crepa_threshold_mode
        crepa_use_backbone_features crepa_use_tae crepa_warmup_steps diff2flow_loss diffusion_blocks_config
        distillation_config ema_cpu_only ema_device ema_foreach_disable freeze_encoder_after freeze_encoder_before
        freeze_encoder_strategy init_lokr_norm internal_guidance_block_index internal_guidance_loss_weight
        irepa_projector_kernel_size irepa_spatial_norm_alpha layersync_lambda layersync_student_block
        layersync_teacher_block lr_scale_sqrt lycoris_config masked_loss_probability nextlat_block_index
        nextlat_kl_weight nextlat_state_loss nextlat_weight nsfw_check_backend_types nsfw_check_min_votes
        nsfw_check_models nsfw_check_sample_types pretrained_unet_subfolder quantization_config
        refiner_training_invert_schedule refiner_training_strength save_text_encoder scheduled_sampling_prob_end
        scheduled_sampling_ramp_shape scheduled_sampling_start_step sdnq_compile_mode sdnq_dequantize_fp32
        sdnq_group_size sdnq_hadamard_group_size sdnq_modules_dtype_dict sdnq_modules_quant_config
        sdnq_modules_to_not_convert sdnq_modules_to_not_use_matmul sdnq_quantized_matmul_dtype sdnq_svd_rank
        sdnq_svd_steps sdnq_use_hadamard sdnq_use_quantized_matmul sdnq_use_static_quantization
        sdnq_use_stochastic_rounding sdnq_use_svd sdnq_weights_dtype singlora_ramp_up_steps text_encoder_limit
        text_encoder_lr twinflow_target_step_count urepa_cutoff_step urepa_decay_steps urepa_encoder_image_size
        urepa_lambda urepa_lambda_end urepa_manifold_weight urepa_model urepa_power urepa_scheduler
        urepa_similarity_ema_decay urepa_similarity_threshold urepa_threshold_mode urepa_use_tae urepa_warmup_steps
        validation_internal_guidance_scale xm_block_size xm_candidate_count xm_selection_scope xm_training_target
        """,
}
IGNORED = {name: reason for reason, names in _IGNORED.items() for name in _names(names)}


@dataclass(frozen=True)
class Refusal:
    """Why an option is refused: it has an effect that this pipeline does not have."""

    reason: str
    off: tuple[object, ...] = ()  # values, beside none, false and 0, that ask for nothing
    within: tuple[str, ...] = ()  # a key, and perhaps its value, without which it has no effect whatever its own value


_NO_METHOD = "this training method is not supported"
_CONSTANT = "scheduled_sampling_probability is constant"
_SAMPLED = ("scheduled_sampling_max_step_offset",)
_ONE_MACHINE = "a training runs on one machine; gradient_accumulation_steps makes the batch as large"
REFUSED = {
    "control": Refusal("a picture as further input is not supported; use a ControlNet-LoRA (controlnet)"),
    "controlnet_custom_config": Refusal("a ControlNet-LoRA has the base model's layers"),
    "controlnet_model_name_or_path": Refusal("a ControlNet-LoRA starts from the base model, or with init_lora"),
    "crepa_enabled": Refusal(_NO_METHOD),
    "diff2flow_enabled": Refusal("IF keeps predicting epsilon"),
    "distillation_method": Refusal(_NO_METHOD),
    "ema_update_interval": Refusal("the moving average is updated at every step", (1,), ("use_ema",)),
    "ema_warmup_steps": Refusal("ema_decay warms up by itself", (), ("use_ema",)),
    "enable_nsfw_check": Refusal("pictures are not classified; sort them out before"),
    "init_lora_ema": Refusal("init_lora takes one file; name the one to start from"),
    "init_lora_step": Refusal("training from init_lora starts at step 0"),
    "internal_guidance_enabled": Refusal(_NO_METHOD),
    "irepa_enabled": Refusal(_NO_METHOD),
    "layersync_enabled": Refusal(_NO_METHOD),
    "lora_format": Refusal("a LoRA is written in diffusers' format", ("diffusers",)),
    "lora_type": Refusal("adapters are LoRA or DoRA, not LyCORIS", ("standard",)),
    "lr_scale": Refusal("learning_rate is not scaled; multiply it yourself"),
    "max_upscale_threshold": Refusal("nothing is ever upsampled: a shape that a picture cannot fill is not used for it"),
    "mixflow_enabled": Refusal(_NO_METHOD),
    "nextlat_enabled": Refusal(_NO_METHOD),
    "num_machines": Refusal(_ONE_MACHINE, (1,)),
    "peft_lora_mode": Refusal("adapters are LoRA or DoRA", ("standard",)),
    "prediction_type": Refusal("IF predicts epsilon", ("epsilon",)),
    "pretrained_t5_model_name_or_path": Refusal("T5 is read from pretrained_model_name_or_path"),
    "pretrained_unet_model_name_or_path": Refusal("the UNet is read from pretrained_model_name_or_path"),
    "prodigy_steps": Refusal("prodigy adapts its step size to the end", (), ("optimizer", "prodigy")),
    "quantize_activations": Refusal("only weights are quantised (base_model_precision)"),
    "refiner_training": Refusal("IF has no refiner; see timestep_bias_strategy = range"),
    "rescale_betas_zero_snr": Refusal("IF's own noise schedule is trained on"),
    "resume_from_checkpoint": Refusal(
        "a run resumes only from its own last checkpoint; init_lora starts from trained weights",
        ("latest",),
    ),
    "revision": Refusal("the hub's main revision is read; name a folder of another in pretrained_model_name_or_path",
                        ("main",)),
    "scheduled_sampling_prob_start": Refusal(_CONSTANT, (), _SAMPLED),
    "scheduled_sampling_ramp_steps": Refusal(_CONSTANT, (), _SAMPLED),
    "scheduled_sampling_strategy": Refusal("offsets are drawn evenly", ("uniform",), _SAMPLED),
    "slider_lora_target": Refusal(_NO_METHOD),
    "snr_weight": Refusal("the loss is not scaled; see learning_rate", (1,)),
    "t5_padding": Refusal("IF attends to all rows of T5, as it was trained", ("unmodified",)),
    "train_text_encoder": Refusal("T5 is not trained"),
    "tread_config": Refusal(_NO_METHOD),
    "twinflow_enabled": Refusal(_NO_METHOD),
    "urepa_enabled": Refusal(_NO_METHOD),
    "use_original_images": Refusal("the data file sets the crops; see crop"),
    "xm_enabled": Refusal(_NO_METHOD),
}  # fmt: skip
