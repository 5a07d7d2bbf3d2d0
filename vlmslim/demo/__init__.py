"""`vlmslim demo`: ask a question about a picture, and see answers, kept tokens and costs of two methods.

questions.py  answers a visitor's question; knows no browser
page.py       the page, made with Gradio
"""
