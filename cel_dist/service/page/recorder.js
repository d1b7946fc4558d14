// Runs in the audio thread: hands on what the microphone gives, some milliseconds at a time.
const SAMPLES = 2048;

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(SAMPLES);
    this.filled = 0;
    this.active = true;
    this.port.onmessage = () => {
      this.active = false;
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null);
    };
  }

  process(inputs) {
    const channel = inputs[0][0];
    for (let i = 0; this.active && channel && i < channel.length; i += 1) {
      this.block[this.filled] = channel[i];
      this.filled += 1;
      if (this.filled === SAMPLES) {
        this.port.postMessage(this.block.slice());
        this.filled = 0;
      }
    }
    return this.active;
  }
}

registerProcessor("recorder", Recorder);
