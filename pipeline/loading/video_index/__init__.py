"""Says which frames a video's file holds, when they are shown and which of them are chosen, without decoding any."""
