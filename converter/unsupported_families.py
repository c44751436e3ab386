"""Model types without a family file, each with the reason why it is not converted, by which commands refuse it.

The reasons are what transformers' model classes compute and megatron-core 0.19.2 does not. `WITHOUT_RULES` begins the reason of
those that megatron-core's layers, or pieces like those of `trainer.layers`, could compute. Knows no weights.
"""

from __future__ import annotations

WITHOUT_RULES = "no rules are written for it yet"

_TYPES_BY_REASON = {
    "its layers attend by lightning attention, of which megatron-core has no layer": "minimax minimax_m1 minimax_text_01",
    "key and value heads have other sizes and numbers in other layers, and megatron-core has one for all": "mimo_v2_flash",
    "each layer has two attentions, and some experts return what they read": "longcat_flash",
    "its layers attend by Kimi Delta Attention or lightning attention, of which megatron-core has no layer": """
        bailing_hybrid bailing_moe_linear kimi_linear
    """,
    "its keys and values are compressed over tokens, and its layers mix several residual streams": "deepseek_v4",
    "layers have embeddings of their own and share keys and values with others": "gemma3n_text gemma4_text gemma4_unified_text",
    "attention and Mamba run side by side in each layer, and megatron-core has one of both in a layer": "falcon_h1",
    "its layers are Mamba-1, and megatron-core has Mamba-2 alone": "falcon_mamba jamba mamba zamba",
    "its attention layers share one set of weights, changed by adapters": "zamba2",
    "its layers are recurrent (RG-LRU), and megatron-core has no such layer": "recurrent_gemma",
    "its layers are recurrent (RWKV or xLSTM), and megatron-core has no such layer": "rwkv rwkv6 rwkv7 xlstm",
    "its layers have short convolutions": "inkling2_loop_text inkling2_text inkling_text lfm2 lfm2_moe lfm3",
    "its attention is a mixture of experts too": "jetmoe",
    "scores of attention are masked by learned functions of values, and its experts are single neurons": "doge",
    "attention is the difference of two softmaxes": "diffllama",
    "states of its gated delta net may change sign, which megatron-core's do not": "olmo_hybrid",
    "tokens are bytes in groups that another model forms": "blt",
    "weights have three values, and norms are inside attention and the feed-forward layer": "bitnet",
    "its sparse attention is not megatron-core's": "axk2 dots3_note_text minimax_m3_vl_text mistral_large4_text qwen4_exp_text",
    "its layers mix several residual streams, of which megatron-core has no layer": "glm5_next_text hy_v4",
    "its layers run several times for each token, which megatron-core's decoder does not do": "dory hrm_text",
    "values are convolved over tokens before attention": "zaya",
    "each head has a gate of its own on its output, and layers may have other numbers of heads": "laguna step3p5 step3p7_text",
    "a bias is added to the gate of each head, and queries grow with their position in some layers": "beam",
    f"{WITHOUT_RULES}: norms without weights, after a rotary embedding that turns the other way": "nanochat",
    f"{WITHOUT_RULES}: caps of scores, norms after branches, and experts, with code of its own": "grok grok-1",
    "layers have other widths, or no attention, layer by layer": "deci nemotron-nas openelm",
    f"{WITHOUT_RULES}: Llama's names, and sinks and a rotary embedding for each layer": "granite_swa granitemoe_swa",
    f"{WITHOUT_RULES}: DeepSeek-V3's names, and a norm after experts": "axk1",
    f"{WITHOUT_RULES}: latent attention as DeepSeek-V3's, and queries that grow with their position": "mistral4_text",
    f"{WITHOUT_RULES}: gated delta nets and experts as Qwen3-Next's": "lara_mini",
    f"{WITHOUT_RULES}: scores are not scaled, and every other layer slides": "gpt_neo",
    f"{WITHOUT_RULES}: embeddings of positions are computed or shifted as OPT's": "biogpt xglm",
    f"{WITHOUT_RULES}: some layers have a bias, others none": "gpt_neox_japanese",
    f"{WITHOUT_RULES}: a decoder of ModernBERT's layers": "modernbert-decoder",
    f"{WITHOUT_RULES}: few people train it today": "cpmant ctrl gpt-sw3 openai-gpt reformer xlm xlnet",
    "it has an encoder beside its decoder, and megatron-core's GPTModel is a decoder alone": """
        bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe
        pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5
    """,
    "it is an encoder, of which megatron-core's GPTModel has no form": """
        bert bert-generation big_bird camembert data2vec-text distilbert electra ernie megatron-bert modernbert rembert
        roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """,
    f"{WITHOUT_RULES}: it comes with code of its own": "bailing_moe deepseek hunyuan internlm minicpm phi-msft phi3small qwen",
    "it reads images, video or sound beside text, or writes them: of these `gemma3`, `mistral3` and `qwen3_5` are converted": """
        apertus1p5 apertus1p5_text aria aria_text audioflamingo3 aya_vision blip blip-2 chameleon cohere2_vision
        cohere_compass cohere_compass_text cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_vl deepseek_vl_hybrid
        diffusion_gemma dots3_note emu3 ernie4_5_vl_moe evolla exaone4_5 fast_vlm florence2 fuyu gemma3n gemma4
        gemma4_assistant gemma4_unified gemma4_unified_assistant git glm46v glm4v glm4v_moe glm5_next glm_ocr glmasr glmga
        got_ocr2 granite4_vision granite_docling granite_speech granite_speech_plus hunyuan_vl hy_v4_vl hyperclovax_vision_v2
        idefics idefics2 idefics3 inkling2 inkling2_loop inkling_mm_model instructblip instructblipvideo internvl
        internvl_chat janus kimi_k25 kimi_vl kosmos-2 kosmos-2.5 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next
        llava_next_video llava_onevision minicpm_ocr minicpmo minicpmv minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral4
        mistral_large4 mllama molmo2 moshi moss_transcribe_diarize muse_glimmer muse_spark musicflamingo musicgen
        musicgen_melody nemo_speechlm nemotron_h_omni omniasr ovis2 paddleocr_vl paligemma perception_lm phi4_multimodal
        phi4mm pi0 pix2struct pp_chart2table pp_formulanet qianfan_ocr qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl
        qwen2_audio qwen2_vl qwen3_asr qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp seamless_m4t
        seamless_m4t_v2 shieldgemma2 smolvlm step3p7 trocr udop unlimited_ocr vibevoice_asr video_llama_3 video_llava vipllava
        vision-encoder-decoder voxtral voxtral_realtime whisper
    """,
}

REASONS = {name: reason for reason, names in _TYPES_BY_REASON.items() for name in names.split()}
"""Why each of these model types is not converted."""
